"""What ReLoRA needs of a run; what cannot work is said before anything is loaded, or before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, UserError
from pegbox.types import ModelOptions

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Tensor

ADAPTER = "default"


def model_options(ctx: Context) -> ModelOptions:
    """The base in float32: in half precision most of what a merge adds would be rounded away.

    Raises:
        ConfigError: no plugin applies adapters, or the config asks for another data type.
    """
    if not ctx.owned(hooks.apply_adapters):
        raise ConfigError(
            "relora is listed, but no plugin applies an adapter",
            "It merges an adapter and begins it anew; it makes none.",
            "Add lora to plugins.",
        )
    dtype = ctx.config.run.model.dtype
    if dtype not in ("auto", "float32"):
        raise ConfigError(
            f"model.dtype is {dtype}, but relora merges into the base",
            "In half precision most of what a merge adds is rounded away.",
            "Remove model.dtype; trainer.precision says in what the forward is computed.",
        )
    return ModelOptions(dtype="float32")


def require_plain_adapter(model: Model, layers: list[tuple[str, LoraLayer]]) -> None:
    """Raise unless every adapted layer is a plain low-rank update in float32 that begins at zero.

    Raises:
        UserError: naming the layer and the setting.
    """
    import torch

    if not layers:
        raise UserError(
            f"relora is listed, but {model.name} has no low-rank adapter of PEFT",
            "It merges adapters of PEFT's LoRA.",
            "Use the plugin lora.",
        )
    for name, layer in layers:
        if layer.use_dora.get(ADAPTER):
            raise _refused(name, "has a magnitude of its own (DoRA)", "set lora.use_dora to false")
        dtype = base_weight(layer).dtype
        if dtype != torch.float32:
            raise _refused(name, f"is in {str(dtype).removeprefix('torch.')}", "do not quantize the base")
        first = beginning(layer)
        if not first.is_meta and bool(first.any()):
            raise _refused(
                name, "does not begin at zero", "set lora.init to default or gaussian, and remove lora.adapter"
            )


def _refused(name: str, what: str, advice: str) -> UserError:
    return UserError(
        f"relora cannot restart the adapter of {name}: it {what}",
        "What is merged must be a plain low-rank update of a float32 weight, and begin anew as it began.",
        f"{advice[0].upper()}{advice[1:]}, or remove relora from plugins.",
    )


def base_weight(layer: LoraLayer) -> Tensor:
    """The weight that an adapted layer merges into."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))  # type: ignore[no-any-return]


def beginning(layer: LoraLayer) -> Tensor:
    """The factor that begins at zero: the second of a linear layer, the first of an embedding."""
    return layer.lora_B[ADAPTER].weight if ADAPTER in layer.lora_B else layer.lora_embedding_A[ADAPTER]
