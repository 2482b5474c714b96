"""Checksums of the parameters that vLLM's workers hold, compared with those of the checkpoint they were sent.

vLLM gives the SHA-256 of each parameter's bytes (`/weight_checker`). Its layout is its own: projections are joined,
split over GPUs, packed for a CPU. So the first sync that the probes have proven tells which parameters can be read:
those whose checksum is that of ours in some data type. From then on each of these must be equal at every sync.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from pegbox.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

    from pegbox_rollout_vllm.cargo import Cargo

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


def digest(tensor: Tensor, dtype: torch.dtype) -> str:
    """SHA-256 of a tensor's bytes in a data type."""
    return hashlib.sha256(tensor.detach().to(dtype).cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def joined(tensors: Mapping[str, Tensor], parts: Sequence[str], dtype: torch.dtype) -> str:
    """SHA-256 of these tensors' bytes, joined along the first dimension, in a data type."""
    found = [tensors[name] for name in parts]
    return digest(torch.cat(found) if len(found) > 1 else found[0], dtype)


def parts_of(name: str) -> tuple[str, ...]:
    """Names in a checkpoint of what a worker's parameter consists of."""
    plain = name.rpartition(":")[2].replace(".base_layer.", ".")
    for whole, single in JOINED.items():
        if f".{whole}." in plain:
            return tuple(plain.replace(f".{whole}.", f".{part}.") for part in single)
    return (plain,)


def readable(checksums: Mapping[str, str], cargo: Cargo) -> dict[str, Readable]:
    """Which of the workers' parameters equal ours; call it when they are known to hold these weights."""
    found = {}
    with cargo.tensors() as tensors:
        for name, value in checksums.items():
            parts = parts_of(name)
            if not all(part in tensors for part in parts):
                continue
            dtypes = (dtype for dtype in DTYPES if joined(tensors, parts, dtype) == value)
            if (dtype := next(dtypes, None)) is not None:
                found[name] = Readable(parts, dtype)
    return found


def require_equal(checksums: Mapping[str, str], cargo: Cargo, known: Mapping[str, Readable], version: str) -> None:
    """Compare every readable parameter.

    Raises:
        RunError: the workers hold other weights than these.
    """
    with cargo.tensors() as tensors:
        other = [name for name, it in known.items() if checksums.get(name) != joined(tensors, it.parts, it.dtype)]
    if other:
        raise RunError(
            f"vLLM does not hold the weights of {version}: {len(other)} of {len(known)} checksums that its "
            f"workers give are others, first {other[0]}",
            "It keeps older weights, or somebody else sends it weights as well.",
            "Look at its log; nothing but this run may update it.",
        )
