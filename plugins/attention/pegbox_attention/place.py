"""Which device a run computes on, as data about implementations names it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HALF = frozenset({"bf16", "fp16"})
EVERY = frozenset({"bf16", "fp16", "fp32", "fp64"})
GPUS = frozenset({"sm_80", "sm_90", "sm_100", "sm_120", "amd"})
"""Those on which the kernels named here train: Ampere and newer, and AMD."""


def generation(device: torch.device) -> str:
    """`cpu`, `amd`, or the first GPU of the generation, as `sm_80` for all of Ampere and Ada."""
    import torch

    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return "amd"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 7:
        return "sm_75" if minor >= 5 else "sm_70"
    return f"sm_{major if major != 11 else 10}0"
