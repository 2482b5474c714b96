"""What an implementation needs of machine and loss, asked before anything expensive."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Literal

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox.types import Loss

    from pegbox_cce.config import Implementation

LIBRARIES = {"apple": ("cut_cross_entropy", "cut-cross-entropy"), "liger": ("liger_kernel", "liger-kernel")}
"""Module and distribution."""


def require_library(implementation: Implementation) -> None:
    """Raise unless the implementation can run here.

    Raises:
        ConfigError: its library is not installed, or there is no GPU for it.
    """
    if implementation == "pegbox":
        return
    import torch

    module, distribution = LIBRARIES[implementation]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"cce.implementation is {implementation}, and {distribution} is not installed",
            "Its kernels are in that library.",
            f"Type: pip install {distribution}; or set cce.implementation to pegbox.",
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"cce.implementation is {implementation}, and there is no GPU",
            f"The kernels of {distribution} run on a GPU only.",
            "Set cce.implementation to pegbox, which runs anywhere.",
        )


def require_served(implementation: Implementation, loss: Loss, precision: Literal["fp32", "bf16", "fp16"]) -> None:
    """Raise if the loss wants what the plugin cannot give.

    Raises:
        ConfigError: it needs all logits, or, of another library, entropy; or fp32 of Apple's.
    """
    if "logits" in loss.needs:
        raise ConfigError(
            f"cce is in plugins, but the loss {type(loss).__name__} needs all logits",
            "They would be in memory whatever the kernel: the plugin would do nothing.",
            "Remove cce from plugins.",
        )
    if implementation != "pegbox" and "entropy" in loss.needs:
        raise ConfigError(
            f"cce.implementation is {implementation}, but the loss {type(loss).__name__} needs entropy",
            "That library returns log-probabilities alone.",
            "Set cce.implementation to pegbox.",
        )
    if implementation == "apple" and precision == "fp32":
        raise ConfigError(
            "cce.implementation is apple, and the run computes in fp32",
            "The backward of cut-cross-entropy takes bf16 and fp16 only.",
            "Set cce.implementation to pegbox, or compute in bf16.",
        )
