"""What was really quantized: nothing that was asked for may be left out without a word.

bitsandbytes knows linear layers only. The experts of most mixtures are stacked in 3-dimensional parameters, which
transformers leaves as they are: most of the model would stay in 16 bits, and the run would be out of memory far from
the cause. A skipped name that matches nothing, and a head that got quantized after all, are errors too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, RunError, did_you_mean

from pegbox_bnb.config import BnbConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelRequest
    from torch import Tensor
    from torch.nn import Module

TRAITS = {"nf4": "quantized_4bit", "fp4": "quantized_4bit", "int8": "quantized_8bit"}
BYTES_PER_GB = 1e9


def inspected(ctx: Context, request: ModelRequest, model: Model) -> Model:
    """The model with the traits of its quantization; a model that was not asked to be quantized as it is.

    Raises:
        ConfigError: experts that cannot be quantized, or a skipped name that matches nothing.
        RunError: nothing was quantized, or the head was.
    """
    if getattr(request.options.quantization, "quant_method", None) != "bitsandbytes":
        return model
    settings = ctx.section(BnbConfig)
    _require_skips(settings, model)
    _require_experts(settings, model)
    if not request.meta:
        _require_quantized(settings, model)
    return replace(model, traits=model.traits | {"quantized", TRAITS[settings.kind]})


def quantized_layers(module: Module) -> dict[str, Module]:
    """The layers that bitsandbytes holds, by name."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    kinds = (Linear4bit, Linear8bitLt)
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, kinds)}


def _require_skips(settings: BnbConfig, model: Model) -> None:
    from torch.nn import Linear
    from transformers.quantizers.quantizers_utils import should_convert_module

    linear = [name for name, layer in model.module.named_modules() if isinstance(layer, Linear)]
    for pattern in settings.skip:
        if all(should_convert_module(name, [pattern]) for name in linear):
            ends = {name.rsplit(".", 1)[-1] for name in linear}
            raise ConfigError(
                f"bnb.skip: '{pattern}' matches no linear layer of {model.name}",
                did_you_mean(pattern.rsplit(".", 1)[-1], ends, "Linear layers:"),
                "Correct or remove it.",
            )


def stacked_weights(module: Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of three dimensions that are no convolutions: experts in one parameter."""
    from torch.nn.modules.conv import _ConvNd

    for prefix, layer in module.named_modules():
        if isinstance(layer, _ConvNd):
            continue
        for name, weight in layer.named_parameters(recurse=False):
            if weight.ndim == 3 and weight.is_floating_point():
                yield f"{prefix}.{name}", weight


def _require_experts(settings: BnbConfig, model: Model) -> None:
    stacked = list(stacked_weights(model.module))
    if not stacked or settings.experts == "keep":
        return
    size = sum(weight.numel() * weight.element_size() for _, weight in stacked)
    raise ConfigError(
        f"{model.name} holds its experts in {len(stacked)} stacked weights such as {stacked[0][0]}; they would stay in "
        f"{str(stacked[0][1].dtype).removeprefix('torch.')}, {size / BYTES_PER_GB:.3g} GB",
        "bitsandbytes quantizes linear layers, and these are parameters of three dimensions.",
        "Set bnb.experts to keep if that fits into memory, or remove bnb.",
    )


def _require_quantized(settings: BnbConfig, model: Model) -> None:
    layers = quantized_layers(model.module)
    if not layers:
        raise RunError(
            f"bnb quantized no layer of {model.name}",
            "It has no linear layer that is not skipped.",
            "Remove bnb from plugins, or shorten bnb.skip.",
        )
    head = model.module.get_output_embeddings()
    name = next((name for name, layer in layers.items() if layer is head), None)
    if name is not None:
        raise RunError(
            f"the head of {model.name}, {name}, was quantized",
            "Its error would be that of every logit, and a tied head is the embeddings.",
            f"Add it to the config: bnb: {{skip: [{name}]}}",
        )
