"""What was really packed: nothing that was asked for may be left out without a word."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError, RunError

from pegbox_mxfp4.config import Mxfp4Config
from pegbox_mxfp4.experts import PARTS, experts_of
from pegbox_mxfp4.quantizer import METHOD, frozen
from pegbox_mxfp4.weight import PackedWeight

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, ModelRequest
    from torch.nn import Module

TRAITS = frozenset({"quantized", "experts_mxfp4"})
BLOCK = 32
BYTES_PER_GB = 1e9


def _asks(request: ModelRequest) -> bool:
    return getattr(request.options.quantization, "quant_method", None) == METHOD


def require_one_process(ctx: Context, request: ModelRequest) -> None:
    """Raise if several processes are to hold the model: replication copies parameters as bytes of floating point.

    Raises:
        ConfigError: there are several.
    """
    runtime: Any = vars(ctx).get("runtime")
    if _asks(request) and not request.meta and runtime is not None and runtime.world_size > 1:
        raise ConfigError(
            f"mxfp4 is in plugins, and {runtime.world_size} processes train",
            "Packed weights are not replicated over processes yet.",
            "Train in one process, or remove mxfp4.",
        )


def inspected(ctx: Context, request: ModelRequest, model: Model) -> Model:
    """The model with packed experts; its shape without weights gets packed shapes.

    Raises:
        ConfigError: it has no experts, such as cannot be packed, or another storage than the config says.
        RunError: experts were not packed.
    """
    if not _asks(request):
        return model
    experts = dict(experts_of(model.module))
    if not experts:
        raise ConfigError(
            f"mxfp4 is in plugins, and {model.name} has no stacked experts",
            "It packs the weights of experts, and leaves all others as they are.",
            "Remove mxfp4 from plugins.",
        )
    if request.meta:
        _require_storage(ctx, model)
        for name, module in experts.items():
            _pack_shape(name, module)
    plain = [f"{name}.{part}" for name, module in experts.items() for part in PARTS if not _is_packed(module, part)]
    if plain:
        raise RunError(
            f"{len(plain)} weights of experts were not packed: {', '.join(plain[:3])}",
            "The loader did not do what was asked of it.",
            "Report it; remove mxfp4 from plugins until then.",
        )
    size = sum(getattr(module, part).packed_bytes for module in experts.values() for part in PARTS)
    ctx.log.info("mxfp4: %d modules of experts in %.3g GB", len(experts), size / BYTES_PER_GB)
    return replace(model, traits=model.traits | TRAITS)


def _is_packed(module: Any, part: str) -> bool:
    return isinstance(getattr(module, part), PackedWeight)


def _require_storage(ctx: Context, model: Model) -> None:
    """Raise if the config of the checkpoint says at once that it is stored in another way."""
    stored: Any = getattr(model.module.config, "quantization_config", None)
    method = None if stored is None else getattr(stored, "quant_method", None) or dict(stored).get("quant_method")
    wanted = None if ctx.section(Mxfp4Config).quantize else "mxfp4"
    if method != wanted:
        raise ConfigError(
            f"{model.name} is stored {'in floating point' if method is None else f'in {method}'}, "
            f"and mxfp4.quantize is {'false' if wanted else 'true'}",
            "Experts stored in MXFP4 are kept as they are; others are packed if the config asks for it.",
            f"Set mxfp4.quantize to {'true' if method is None else 'false'}, or remove mxfp4.",
        )


def _pack_shape(name: str, module: Any) -> None:
    """Replace weights on the meta device by packed ones."""
    for part in PARTS:
        weight = getattr(module, part)
        experts, rows, columns = weight.shape
        outs, ins = (columns, rows) if module.is_transposed else (rows, columns)
        if ins % BLOCK:
            raise ConfigError(
                f"{name}.{part} has rows of {ins} numbers",
                f"MXFP4 packs {BLOCK} numbers of a row together.",
                "Remove mxfp4 from plugins.",
            )
        blocks = torch.empty(experts, outs, ins // BLOCK, BLOCK // 2, dtype=torch.uint8, device="meta")
        packed = PackedWeight(blocks, blocks[..., 0], module.is_transposed, weight.dtype)
        setattr(module, part, frozen(packed))


def require_cheap_adapters(ctx: Context, model: Model) -> None:
    """Raise if an adapter on packed experts would unpack all of them and change them as a whole.

    Raises:
        ConfigError: naming the plugin that computes such adapters beside the product.
    """
    served = {id(applied.module) for applied in ctx.kernel.patches.applied if applied.patch.slot == "experts"}
    for name, wrapper in _wrapped(model.module):
        if id(wrapper) not in served:
            raise ConfigError(
                f"an adapter is on packed experts: {name}",
                "PEFT would unpack all experts of a layer, add the update of each, and make a gradient as large.",
                "Add scattermoe to plugins: it computes the adapter beside the product.",
            )


def _wrapped(module: Module) -> list[tuple[str, Module]]:
    """Outermost wrappers of an adapter around packed experts."""
    found: list[tuple[str, Module]] = []
    for name, part in module.named_modules():
        inner: Any = part
        while hasattr(inner, "base_layer"):
            inner = inner.base_layer
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if inner is not part and not inside and any(_is_packed(inner, p) for p in PARTS if hasattr(inner, p)):
            found.append((name, part))
    return found
