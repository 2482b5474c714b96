"""What is asked of the loader: the experts stay packed, and by which quantizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.types import ModelOptions

from pegbox_mxfp4.config import Mxfp4Config
from pegbox_mxfp4.experts import PARTS

if TYPE_CHECKING:
    from pegbox.context import Context


def options(ctx: Context) -> ModelOptions:
    """The request that experts be kept packed.

    Raises:
        ConfigError: no plugin applies adapters.
    """
    if not ctx.owned(hooks.apply_adapters):
        raise ConfigError(
            "mxfp4 keeps the experts packed, and no plugin applies adapters",
            "Packed weights cannot be trained; an adapter beside them can.",
            "Add lora to plugins, or remove mxfp4.",
        )
    from pegbox_mxfp4.quantizer import PackedExpertsConfig

    return ModelOptions(
        quantization=PackedExpertsConfig(ctx.section(Mxfp4Config).quantize),
        keep_packed=tuple(f"*.experts.{part}" for part in PARTS),
    )
