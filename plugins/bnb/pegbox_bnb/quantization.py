"""The config's settings as transformers' `BitsAndBytesConfig`: the loader quantizes while it reads the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, PluginError
from pegbox.types import ModelOptions

from pegbox_bnb.config import BnbConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from transformers import BitsAndBytesConfig

HEADS = ("lm_head", "embed_out")
"""Names of heads. They stay unquantized: their error would be that of the logits, and a tied one is the embeddings."""


def options(ctx: Context) -> ModelOptions:
    """The request that the base be quantized.

    Raises:
        ConfigError: no plugin applies adapters.
        PluginError: bitsandbytes does not work here.
    """
    if not ctx.owned(hooks.apply_adapters):
        raise ConfigError(
            "bnb quantizes the base, and no plugin applies adapters",
            "Quantized weights cannot be trained; an adapter on them can.",
            "Add lora to plugins, or remove bnb.",
        )
    try:
        import bitsandbytes  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise PluginError(
            f"bitsandbytes cannot be imported: {str(error).splitlines()[0]}",
            "The plugin bnb quantizes with it.",
            "Type: pip install 'bitsandbytes>=0.48'",
        ) from error
    return ModelOptions(quantization=quantization(ctx.section(BnbConfig)))


def quantization(settings: BnbConfig) -> BitsAndBytesConfig:
    """The same settings in transformers' words."""
    import torch
    from transformers import BitsAndBytesConfig

    skip = [*HEADS, *settings.skip]
    if settings.kind == "int8":
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=settings.outlier_threshold, llm_int8_skip_modules=skip
        )
    wanted = settings.compute_dtype
    compute = best_compute_dtype() if wanted == "auto" else getattr(torch, wanted)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.kind,
        bnb_4bit_use_double_quant=settings.double_quant,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=getattr(torch, settings.storage_dtype),
        llm_int8_skip_modules=skip,
    )


def best_compute_dtype() -> object:
    """bfloat16 where the device multiplies it, else float32."""
    import torch

    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32
