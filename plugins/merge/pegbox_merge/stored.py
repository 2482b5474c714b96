"""The weights of a checkpoint, one dense tensor at a time: safetensors files are read tensor by tensor.

They are read, not mapped: pages of a mapped file stay in memory until it is closed, so that memory would grow with the
size of the shards.

Weights that bitsandbytes packed look dense here: the pieces that a packed weight is stored in (scales, code book, its
own shape) are put together when it is read. Layouts: bitsandbytes' `QuantState.as_dict(packed=True)` and transformers'
`Linear8bitLt` (`SCB`: largest magnitude of each row).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal

import torch
from pegbox.errors import DataError, UserError
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
STATE = ".quant_state.bitsandbytes__"
PIECES_4BIT = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class Entry:
    """One dense tensor of a checkpoint: its data type and shape after dequantization, and where its pieces are."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    packing: Literal["none", "4bit", "int8"] = "none"
    pieces: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes."""
        return int(prod(self.shape) * self.dtype.itemsize)


@dataclass(frozen=True)
class Piece:
    """One tensor of a file, as it is stored; `offset` counts bytes from the beginning of the file."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype)
        if tensor.numel():
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.offset)
                room = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                while len(room):
                    taken = file.readinto(room)
                    if not taken:
                        raise DataError(f"{self.file} is cut off", "It ends inside a tensor.", "Fetch the model again.")
                    room = room[taken:]
        return tensor


@dataclass
class Stored:
    """The dense tensors of a folder of safetensors, by name, in the order of the files."""

    folder: Path
    pieces: dict[str, Piece]
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, dequantized: torch.dtype) -> Stored:
        """Read names and shapes; no weights.

        Args:
            dequantized: data type of int8 weights when they are dequantized (4-bit ones keep their own).

        Raises:
            UserError: the folder holds no safetensors, or a file that its index names is missing.
        """
        pieces: dict[str, Piece] = {}
        for file in _files(folder):
            pieces.update(sorted(_header(file), key=lambda pair: _natural(pair[0])))
        made = cls(folder, pieces)
        made.entries = {entry.name: entry for entry in made._dense(dequantized)}
        return made

    def read(self, name: str) -> Tensor:
        """One dense tensor, as stored or dequantized."""
        entry = self.entries[name]
        if entry.packing == "none":
            return self.pieces[name].read()
        if entry.packing == "int8":
            return _from_int8(self.pieces[name].read(), self.pieces[entry.pieces[0]].read(), entry.dtype)
        pieces = {piece.removeprefix(f"{name}."): self.pieces[piece].read() for piece in entry.pieces}
        return _from_4bit(self.pieces[name].read(), pieces)

    def _dense(self, dequantized: torch.dtype) -> Iterator[Entry]:
        shapes = self.pieces
        owners = {name.partition(STATE)[0]: name for name in shapes if STATE in name}
        scales = {name.removesuffix("SCB") + "weight": name for name in shapes if name.endswith(".SCB")}
        hidden = {f"{owner}{end}" for owner in owners for end in PIECES_4BIT} | set(owners.values())
        hidden |= set(scales.values()) | {f"{weight}_format" for weight in scales}
        for name, piece in shapes.items():
            if name in hidden:
                continue
            if name in owners:
                state = json.loads(bytes(self.pieces[owners[name]].read().tolist()))
                parts = tuple(f"{name}{end}" for end in PIECES_4BIT if f"{name}{end}" in shapes)
                kept = getattr(torch, state["dtype"])
                yield Entry(name, kept, tuple(state["shape"]), "4bit", (*parts, owners[name]))
            elif name in scales:
                yield Entry(name, dequantized, piece.shape, "int8", (scales[name],))
            else:
                yield Entry(name, piece.dtype, piece.shape)


def _files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [folder / name for name in named]
    elif (folder / "model.safetensors").is_file():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))
    lacking = [file.name for file in files if not file.is_file()]
    if lacking or not files:
        raise DataError(
            f"the base model {folder} lacks {', '.join(lacking) or 'safetensors files'}",
            "Its weights are merged with the adapter.",
            "Fetch the model again, or name another folder: --base FOLDER_OR_HUB_NAME",
        )
    return files


def _header(file: Path) -> Iterator[tuple[str, Piece]]:
    with file.open("rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, part in header.items():
        if part["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} has the data type {part['dtype']}",
                "It cannot be read as a dense tensor.",
                "Merge into the unquantized model of the same name: --base FOLDER_OR_HUB_NAME",
            )
        offset = 8 + length + part["data_offsets"][0]
        yield name, Piece(file, offset, DTYPES[part["dtype"]], tuple(part["shape"]))


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else f"~{part}" for part in name.split(".")]


def _from_int8(packed: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Row r of the weight is its int8 row times SCB[r] / 127 (Dettmers et al. 2022, arXiv:2208.07339)."""
    return (packed.float() * scale.float()[:, None] / 127).to(dtype)


def _from_4bit(packed: Tensor, pieces: dict[str, Tensor]) -> Tensor:
    try:
        from bitsandbytes.functional import QuantState, dequantize_4bit
    except ImportError as error:
        raise UserError(
            "the base model is stored in 4 bits by bitsandbytes, which is not installed",
            "It is needed to dequantize the weights.",
            "Type: pip install 'pegbox-merge[bnb]'",
        ) from error
    state = QuantState.from_dict(qs_dict=pieces, device=torch.device("cpu"))
    return dequantize_4bit(packed, state)
