"""Tokenized rows kept between runs, by what they depend on.

A key is made of the file's content, the source, the format with its options, template and tokenizer, and the code
that makes tokens. What does not change a token (lengths, weights, splits, where the file lies) is no part of it. A
piece is written beside its place and moved there at once; a lock lets one process build while others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import DataError

from pegbox_data.files import sampled_digest
from pegbox_data.pieces import ARRAYS, Piece, PieceWriter, opened, tallies_from_json, tallies_to_json

if TYPE_CHECKING:
    from pegbox_data.pieces import Tally

LAYOUT = 2
"""Changes with the files that a piece is kept in."""
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
NOT_TOKENIZING = {
    *("__init__", "building", "cache", "command", "config", "cursor", "declared", "elsewhere", "entries", "examples"),
    *("files", "hub", "inspecting", "lengths", "loading", "mixing", "pairwise", "pieces", "places", "report"),
    *("slices", "stream", "synthetic", "viewing"),
}
"""Modules of this package that do not change a token."""


@dataclass(frozen=True)
class Cache:
    """Pieces by key, in a folder."""

    folder: Path
    say: Callable[[str], None]

    def piece(self, key: str, build: Callable[[PieceWriter], int]) -> Piece:
        """The piece of a key; `build` writes its rows and says how many were read, if there is none yet."""
        from filelock import FileLock

        place = self.folder / "pieces" / key[:2] / key
        found = self._open(place)
        if found is not None:
            return found
        self._make(place.parent)
        with FileLock(place.with_suffix(".lock")):
            found = self._open(place)  # another process may have built it meanwhile
            return found if found is not None else self._build(place, build)

    def bytes_of(self, key: str) -> int:
        """Size of a piece on disk."""
        place = self.folder / "pieces" / key[:2] / key
        return sum(file.stat().st_size for file in place.iterdir()) if place.is_dir() else 0

    def _build(self, place: Path, build: Callable[[PieceWriter], int]) -> Piece:
        part = place.with_suffix(f".{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        self._make(part)
        writer = PieceWriter(part)
        try:
            read = build(writer)
            writer.close(read)
            _describe(part, read, writer.findings)
            if place.exists():
                self.say(f"the kept rows {place.name} are damaged and were made again")
                shutil.rmtree(place, ignore_errors=True)
            part.rename(place)
        except OSError as error:
            if error.errno not in NO_PLACE:
                raise
            raise DataError(
                f"the cache {self.folder} cannot be written: {error.strerror or error}",
                "Tokenized rows are kept there.",
                "Make room, or set data.cache to another folder or to off.",
            ) from error
        finally:
            writer.discard()
            shutil.rmtree(part, ignore_errors=True)
        piece = self._open(place)
        assert piece is not None
        return piece

    def _open(self, place: Path) -> Piece | None:
        """A piece that is whole, or None."""
        try:
            about = json.loads((place / "piece.json").read_text(encoding="utf-8"))
            for name in ARRAYS:
                if sampled_digest(place / f"{name}.bin") != about["files"][name]:
                    return None
            return opened(place, about["read"], tallies_from_json(about["findings"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the cache {self.folder} cannot be made: {error.strerror or error}",
                "Tokenized rows are kept there.",
                "Set data.cache to another folder or to off.",
            ) from error


def _describe(folder: Path, read: int, findings: dict[str, Tally]) -> None:
    files = {name: sampled_digest(folder / f"{name}.bin") for name in ARRAYS}
    about = {"read": read, "findings": tallies_to_json(findings), "files": files}
    (folder / "piece.json").write_text(json.dumps(about), encoding="utf-8")


def default_folder() -> Path:
    """The user's cache folder, where the XDG specification puts it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if named.startswith("/") else Path.home() / ".cache") / "pegbox" / "data"


def key_of(*parts: object) -> str:
    """A key of plain data; the code that makes tokens is a part of it."""
    content = json.dumps([LAYOUT, code_version(), *parts], sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


@lru_cache
def code_version() -> str:
    """Identifies the code that makes tokens: ours, and the libraries that render and tokenize."""
    import jinja2
    import tokenizers

    state = hashlib.blake2b(f"{tokenizers.__version__} {jinja2.__version__}".encode(), digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.stem not in NOT_TOKENIZING:
            state.update(path.read_bytes())
    return state.hexdigest()
