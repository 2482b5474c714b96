"""Checksums of the parameters that vLLM's workers hold, compared with those of the checkpoint they were sent.

vLLM gives the SHA-256 of each parameter's bytes (`/weight_checker`). Its layout is its own: projections are joined,
split over GPUs, packed for a CPU. So the first sync that the probes have proven tells which parameters can be read:
those whose checksum is that of ours in some data type. From then on each of these must be equal at every sync.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from pegbox.errors import RunError
from safetensors import safe_open

if TYPE_CHECKING:
    from torch import Tensor

JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Layers that vLLM joins along their outputs, in this order."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Readable(NamedTuple):
    """A parameter of a worker that can be compared: our tensors that it consists of, and its data type."""

    parts: tuple[str, ...]
    dtype: torch.dtype


class Checkpoint:
    """The tensors of a folder of safetensors files by name, read when they are asked for."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, object] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def digest(self, parts: Sequence[str], dtype: torch.dtype) -> str:
        """SHA-256 of these tensors' bytes, joined along the first dimension, in a data type."""
        tensors = [self._files[name].get_tensor(name) for name in parts]  # type: ignore[attr-defined]
        return digest(torch.cat(tensors) if len(tensors) > 1 else tensors[0], dtype)


def digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 of a tensor's bytes in a data type."""
    return hashlib.sha256(tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def parts_of(name: str) -> tuple[str, ...]:
    """Names in a checkpoint of what a worker's parameter consists of."""
    plain = name.rpartition(":")[2].replace(".base_layer.", ".")
    for joined, single in JOINED.items():
        if f".{joined}." in plain:
            return tuple(plain.replace(f".{joined}.", f".{part}.") for part in single)
    return (plain,)


def readable(checksums: Mapping[str, str], folder: Path) -> dict[str, Readable]:
    """Which of the workers' parameters equal ours; call it when they are known to hold this folder's weights."""
    found = {}
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        for name, value in checksums.items():
            parts = parts_of(name)
            if not all(part in checkpoint for part in parts):
                continue
            dtypes = (dtype for dtype in DTYPES if checkpoint.digest(parts, dtype) == value)
            if (dtype := next(dtypes, None)) is not None:
                found[name] = Readable(parts, dtype)
    return found


def require_equal(checksums: Mapping[str, str], folder: Path, known: Mapping[str, Readable], version: str) -> None:
    """Compare every readable parameter.

    Raises:
        RunError: the workers hold other weights than those of `folder`.
    """
    with ExitStack() as stack:
        checkpoint = Checkpoint(folder, stack)
        other = [name for name, it in known.items() if checksums.get(name) != checkpoint.digest(it.parts, it.dtype)]
    if other:
        raise RunError(
            f"the vLLM server does not hold the weights of {version}: {len(other)} of {len(known)} checksums that its "
            f"workers give are others, first {other[0]}",
            "It keeps older weights, or somebody else sends it weights as well.",
            "Look at the server's log; nothing but this run may update it.",
        )
