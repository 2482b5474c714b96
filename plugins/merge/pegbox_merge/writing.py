"""Writing safetensors while the tensors come, in any order: no shard is ever held in memory.

Shapes and data types are known before the first tensor, so every file's header is written first, and each tensor goes
to its place. The format is a length, a JSON header with offsets, and the bytes (safetensors' own description); its
library writes only what is in memory as a whole.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from pegbox.errors import UserError
from torch import Tensor

from pegbox_merge.stored import DTYPES

CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shape:
    """What a tensor will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(prod(self.shape) * self.dtype.itemsize)


@dataclass
class ShardWriter:
    """Files of one checkpoint, all of whose tensors are known by name and shape."""

    folder: Path
    shapes: Mapping[str, Shape]
    _places: dict[str, tuple[Path, int]] = field(default_factory=dict)
    _files: dict[Path, BinaryIO] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, shapes: Mapping[str, Shape], max_shard_size: str) -> ShardWriter:
        """Divide the tensors into files and write the headers.

        Raises:
            UserError: `max_shard_size` is no size.
        """
        from huggingface_hub import split_state_dict_into_shards_factory

        try:
            split = split_state_dict_into_shards_factory(
                dict(shapes),
                get_storage_size=lambda shape: shape.size,
                filename_pattern="model{suffix}.safetensors",
                max_shard_size=max_shard_size,
            )
        except ValueError as error:
            raise UserError(
                f"--max-shard-size '{max_shard_size}' is no size", str(error), "Write a number and a unit, such as 5GB."
            ) from error
        writer = cls(folder, shapes)
        for name, tensors in split.filename_to_tensors.items():
            writer._begin(folder / name, tensors)
        if split.is_sharded:
            total = sum(shape.size for shape in shapes.values())
            index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        return writer

    @property
    def shards(self) -> int:
        """How many files."""
        return len(self._files)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put one tensor where it belongs; its data type and shape are as announced."""
        announced = self.shapes[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (announced.dtype, announced.shape), name
        path, offset = self._places.pop(name)
        file = self._files[path]
        file.seek(offset)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        file.write(memoryview(flat.view(torch.uint8).numpy()))

    def close(self) -> None:
        """Make the files durable.

        Raises:
            RuntimeError: a tensor was announced and never written.
        """
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if self._places:
            raise RuntimeError(f"never written: {', '.join(sorted(self._places)[:5])}")

    def abort(self) -> None:
        """Close the files, complete or not."""
        for file in self._files.values():
            file.close()

    def _begin(self, path: Path, names: list[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            shape = self.shapes[name]
            header[name] = {
                "dtype": CODES[shape.dtype],
                "shape": list(shape.shape),
                "data_offsets": [end, end + shape.size],
            }
            end += shape.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        file.write(struct.pack("<Q", len(text)) + text)
        begin = 8 + len(text)
        file.truncate(begin + end)
        self._files[path] = file
        for name in names:
            place = header[name]["data_offsets"][0]  # type: ignore[index]
            self._places[name] = (path, begin + place)
