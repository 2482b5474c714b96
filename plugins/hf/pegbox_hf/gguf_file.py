"""Reading the header of a GGUF file, and writing it again without its vocabulary.

A GGUF file is a header (typed key-value pairs and a table of tensors) followed by the tensors' bytes. transformers
reads it through `gguf.GGUFReader`, which makes numpy views of every token and every merge: seconds for each of the
four times that transformers opens the file. This reader walks the header once; `write_slim` then gives transformers
a header without the vocabulary, which it reads in no time.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from pegbox.errors import UserError

Value = bool | int | float | str | list["Value"]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
VOCABULARY = ("tokens", "scores", "token_type", "merges")
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class Field:
    """One key-value pair: its value, and where it stands in the file."""

    value: Value
    start: int
    end: int


@dataclass(frozen=True)
class Tensor:
    """One tensor of the table: shape with the slowest dimension first (as torch has it), ggml type, place."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file.

    Attributes:
        fields: key-value pairs by key.
        tensors: the table of tensors, by name; their offsets count from `data`.
        table: byte range of the tensor table.
        data: where the tensors' bytes begin.
    """

    path: Path
    version: int
    fields: dict[str, Field]
    tensors: dict[str, Tensor]
    table: tuple[int, int]
    data: int

    def get(self, key: str) -> Value | None:
        """The value of a key, None if the file has none."""
        field = self.fields.get(key)
        return None if field is None else field.value

    @property
    def architecture(self) -> str:
        return str(self.get("general.architecture"))

    @property
    def alignment(self) -> int:
        """What positions of tensors are multiples of, in bytes."""
        written = self.get("general.alignment")
        return written if isinstance(written, int) else DEFAULT_ALIGNMENT


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def unpack(self, form: str) -> tuple[int, ...]:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.unpack("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Value:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise ValueError(f"value of unknown type {kind}")
        element, count = self.unpack("IQ")
        if element in SCALARS:
            return list(self.unpack(f"{count}{SCALARS[element]}"))
        return [self.value(element) for _ in range(count)]


def read(path: Path) -> GgufFile:
    """Read the header of a GGUF file; no tensor is read.

    Raises:
        UserError: the file is no GGUF file, is cut short, or is one part of several.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _header(path, _Reader(data))
    except (ValueError, struct.error) as error:
        raise UserError(
            f"{path} cannot be read as a GGUF file: {error}",
            "The file is cut short, or of another kind.",
            "Download it again, or name another file.",
        ) from error
    parts = header.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model",
            "Only whole GGUF files are converted.",
            f"Join them: llama-gguf-split --merge {path} {path.with_name('whole.gguf')}",
        )
    return header


def _header(path: Path, reader: _Reader) -> GgufFile:
    if reader.data[:4] != MAGIC:
        raise ValueError("it does not begin with 'GGUF'")
    reader.at = 4
    version, tensor_count, field_count = reader.unpack("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"GGUF version {version} (known: {', '.join(map(str, VERSIONS))})")
    fields = {}
    for _ in range(field_count):
        start = reader.at
        key = reader.text()
        (kind,) = reader.unpack("I")
        fields[key] = Field(reader.value(kind), start, reader.at)
    table_start, tensors = reader.at, {}
    for _ in range(tensor_count):
        name = reader.text()
        (dimensions,) = reader.unpack("I")
        shape = tuple(reversed(reader.unpack(f"{dimensions}Q")))
        tensors[name] = Tensor(shape, *reader.unpack("IQ"))
    header = GgufFile(path, version, fields, tensors, (table_start, reader.at), 0)
    return replace(header, data=_aligned(reader.at, header.alignment))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def write_slim(header: GgufFile, target: Path) -> None:
    """Write the header again without the vocabulary, and an empty place for the tensors (a sparse file).

    The result is a GGUF file from which a config can be read, quickly.
    """
    dropped = {f"tokenizer.ggml.{name}" for name in VOCABULARY}
    kept = [field for key, field in header.fields.items() if key not in dropped]
    with header.path.open("rb") as source, target.open("wb") as out:
        out.write(MAGIC + struct.pack("<IQQ", header.version, len(header.tensors), len(kept)))
        for start, end in [(field.start, field.end) for field in kept] + [header.table]:
            source.seek(start)
            out.write(source.read(end - start))
        size = header.path.stat().st_size - header.data
        out.truncate(_aligned(out.tell(), header.alignment) + size)
