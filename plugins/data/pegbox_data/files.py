"""Files wherever they lie: local, at any fsspec address, compressed; found by name, glob or folder.

A file's identity is its content. For local files the digest is remembered together with size and time of change, so
that it is computed once; for remote ones the store's own checksum counts where it names one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from pegbox.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

COMPRESSED = (".gz", ".zst")
EXTRAS = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "az"),
    **dict.fromkeys(("http", "https"), "http"),
    "oci": "oci",
}
"""Which extra of this package brings the library for an address."""
CHECKSUMS = ("ETag", "etag", "Content-MD5", "Digest", "md5Hash", "crc32c", "sha256", "content_md5")
MIB = 1 << 20


@dataclass(frozen=True)
class DataFile:
    """One file.

    Attributes:
        address: its absolute path, or an address such as `s3://bucket/rows.jsonl`.
        name: what messages call it.
    """

    address: str
    name: str

    @property
    def is_remote(self) -> bool:
        return "://" in self.address

    @property
    def plain_name(self) -> str:
        """Its name in lower case without what says how it is compressed."""
        name = self.address.partition("?")[0].rpartition("/")[2].lower()
        return next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)

    @property
    def is_compressed(self) -> bool:
        return self.address.partition("?")[0].lower().endswith(COMPRESSED)

    @cached_property
    def _remote(self) -> tuple[Any, str]:
        return filesystem(self.address)

    @cached_property
    def _info(self) -> Mapping[str, Any]:
        """What its store says of it: size, checksums."""
        fs, path = self._remote
        try:
            return cast("Mapping[str, Any]", fs.info(path))
        except FileNotFoundError as error:
            raise self._unknown() from error

    def _unknown(self) -> DataError:
        return DataError(f"{self.name} does not exist", "Its store does not know it.", "Correct the path.")

    def open(self, offset: int = 0) -> BinaryIO:
        """Its bytes, uncompressed, from `offset` on."""
        opened = self._open_plain()
        if offset and opened.seekable():
            opened.seek(offset)
        while offset and not opened.seekable():
            skipped = len(opened.read(min(offset, MIB)))
            offset = offset - skipped if skipped else 0
        return opened

    def _open_plain(self) -> BinaryIO:
        raw = self._open_raw()
        ending = self.address.partition("?")[0].lower()
        if ending.endswith(".gz"):
            return cast("BinaryIO", gzip.GzipFile(fileobj=raw))
        return _zstandard(raw, self.name) if ending.endswith(".zst") else raw

    def _open_raw(self) -> BinaryIO:
        if not self.is_remote:
            return Path(self.address).open("rb")
        fs, path = self._remote
        try:
            return cast("BinaryIO", fs.open(path, "rb"))
        except FileNotFoundError as error:
            raise self._unknown() from error

    @property
    def size(self) -> int | None:
        """Bytes as stored; None if its store does not tell."""
        if not self.is_remote:
            return Path(self.address).stat().st_size
        return cast("int | None", self._info.get("size"))

    def digest(self, memo: DigestMemo) -> str:
        """Identifies its content."""
        if not self.is_remote:
            return memo.digest(Path(self.address))
        for key in CHECKSUMS:
            if self._info.get(key):
                return f"{key} {self._info[key]} {self._info.get('size')}"
        with self._open_raw() as file:
            return _digest(file)

    def sketch(self) -> str:
        """Identifies its content by size and samples, without reading all of it."""
        if self.is_remote:
            known = [str(self._info[key]) for key in CHECKSUMS if self._info.get(key)]
            return json.dumps([self._info.get("size"), *known])
        return sampled_digest(Path(self.address))


class DigestMemo:
    """Digests of local files by path, size and time of change, kept in a folder (None: not kept)."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def digest(self, path: Path) -> str:
        """The digest of a file's content."""
        stat = path.stat()
        seen = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        # A file that changed a moment ago may change again without its time telling so.
        settled = time.time() - stat.st_mtime > 2
        note = self._note(path)
        if note is not None and settled:
            known = _read_note(note)
            if known is not None and known[:-1] == seen:
                return str(known[-1])
        with path.open("rb") as file:
            digest = _digest(file)
        if note is not None and settled and stat.st_size > MIB:
            note.parent.mkdir(parents=True, exist_ok=True)
            part = note.with_name(f"{note.name}.{time.monotonic_ns()}.part")
            part.write_text(json.dumps([*seen, digest]), encoding="utf-8")
            part.replace(note)
        return digest

    def _note(self, path: Path) -> Path | None:
        if self._folder is None:
            return None
        return self._folder / "digests" / hashlib.blake2b(str(path).encode(), digest_size=16).hexdigest()


def sampled_digest(path: Path, blocks: int = 64, block: int = 1 << 16) -> str:
    """A digest of a file's size and of blocks spread evenly over it; of all of it if it is small."""
    size = path.stat().st_size
    state = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as file:
        if size <= blocks * block:
            state.update(file.read())
        else:
            for number in range(blocks):
                file.seek((size - block) * number // (blocks - 1))
                state.update(file.read(block))
    return state.hexdigest()


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it; a library that is missing is an error naming it."""
    import fsspec

    protocol = address.partition("://")[0]
    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(address))
    except ImportError as error:
        extra = EXTRAS.get(protocol)
        raise DataError(
            f"{address}: the library for {protocol}:// is not installed",
            f"fsspec says: {error}",
            f"Type: pip install 'pegbox-data[{extra}]'" if extra else "Install the library that it names.",
        ) from error
    except ValueError as error:
        raise DataError(
            f"{address}: nothing reads {protocol}://",
            f"fsspec says: {error}",
            f"Known: {', '.join(sorted(EXTRAS))}, and every protocol that fsspec knows.",
        ) from error


def remote_files(address: str) -> list[DataFile]:
    """The files that an address names: one, those below a folder, or those that match a glob. Sorted by name."""
    fs, path = filesystem(address)
    protocol = address.partition("://")[0]
    try:
        if protocol in ("http", "https"):
            return [DataFile(address, address)]
        if any(letter in path for letter in "*?["):
            found = fs.glob(path)
        else:
            found = fs.find(path) if fs.isdir(path) else [path]
            if found == [path] and not fs.exists(path):
                found = []
    except Exception as error:  # whatever the store's library raises: credentials, network, permissions
        raise DataError(
            f"{address} cannot be listed",
            f"The store says: {type(error).__name__}: {error}",
            "Check address and access.",
        ) from error
    named = [str(fs.unstrip_protocol(name)) for name in sorted(found)]
    return [DataFile(name, name) for name in named if not _hidden(name)]


def local_files(path: Path) -> list[Path]:
    """The files that a local path names: itself, those below a folder, or those that match a glob. Sorted."""
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(str(file.relative_to(path))))
    if is_glob(str(path)):
        root = Path(path.anchor)
        return sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    return []


def is_glob(written: str) -> bool:
    """Whether a path has wildcards."""
    return any(letter in written for letter in "*?[")


def shown(path: Path) -> str:
    """A path as a person in the current folder would write it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def of_split(files: Sequence[DataFile], root: str, split: str) -> list[DataFile]:
    """The files of one split: below a folder of its name, or with a name that begins with it."""

    def belongs(file: DataFile) -> bool:
        inside = file.address.removeprefix(root).strip("/").split("/")
        return (
            split in inside[:-1]
            or inside[-1] == split
            or inside[-1].startswith((f"{split}-", f"{split}.", f"{split}_"))
        )

    return [file for file in files if belongs(file)]


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in name.split("/"))


def _digest(file: BinaryIO) -> str:
    state = hashlib.blake2b(digest_size=16)
    while block := file.read(MIB):
        state.update(block)
    return state.hexdigest()


def _read_note(note: Path) -> list[Any] | None:
    try:
        known = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return known if isinstance(known, list) and len(known) == 4 else None


def _zstandard(raw: BinaryIO, name: str) -> BinaryIO:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{name}: pyarrow is not installed",
            "Files compressed with Zstandard are read with it.",
            "Type: pip install 'pegbox-data[parquet]'",
        ) from error
    return cast("BinaryIO", io.BufferedReader(_Readable(pyarrow.CompressedInputStream(raw, "zstd")), MIB))


class _Readable(io.RawIOBase):
    """A stream of pyarrow as Python's `io` wants it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
