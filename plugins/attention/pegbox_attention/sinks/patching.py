"""Attention with sinks by borders of documents, as patch records: one for each kind of layers.

Which backend computes which layers is decided where the run is, and checked there; on the meta device only what is
known is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError, RunError
from pegbox.types import ModulePatch, SeamChange

from pegbox_attention.checking import Heads, check
from pegbox_attention.maskless import MasklessAttention, registered, window_of
from pegbox_attention.sinks.choice import PREFERENCES, Backend, Kind, choose, place_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, Runtime
    from torch.nn import Module

    from pegbox_attention.sinks.config import GptOssAttentionConfig

SEAM = "transformers.AttentionInterface"
SOURCE = "gpt-oss model card, arXiv:2508.10925"
SINKS = "sinks"
SHORT = {"flash-attn-4": "cute", "pegbox": "triton", "flex": "flex", "eager": "eager"}
"""In names for transformers, which takes one with `flash` for its own."""
WEIGHTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def patches(ctx: Context, config: GptOssAttentionConfig, model: Model) -> list[ModulePatch]:
    """The records for one model; with a device, each backend is chosen and checked.

    Raises:
        ConfigError: a backend cannot serve, or the model drops attention weights.
        RunError: a backend fails its check.
    """
    layers = {name: part for name, part in model.module.named_modules() if hasattr(part, SINKS)}
    if not layers:
        return [_refusal()]
    _require_no_dropout(model)
    kinds: dict[Kind, dict[str, Module]] = {}
    for name, layer in layers.items():
        kinds.setdefault("full" if window_of(layer) is None else "window", {})[name] = layer
    shapes = {kind: _heads(next(iter(members.values()))) for kind, members in kinds.items()}
    runtime: Runtime | None = vars(ctx).get("runtime")
    if runtime is None:
        return _records(model, kinds, {kind: _expected(kind, config, shapes[kind]) for kind in kinds}, _undecided())
    weights = WEIGHTS[_dtype(model)]
    place = place_of(runtime, weights)
    chosen = {kind: choose(kind, config, shape, place) for kind, shape in shapes.items()}
    reasons = {}
    for kind, name in chosen.items():
        said = held_to_plain_attention(
            kind, name, shapes[kind], runtime.device, place.dtype or weights, deterministic=config.deterministic
        )
        reasons[kind] = f"{name}{', deterministic' * config.deterministic}: {shapes[kind]}; {said}"
        if runtime.rank == 0:
            ctx.log.info("attention of %d %s layers: %s", len(kinds[kind]), kind, reasons[kind])
    return _records(model, kinds, reasons, _function(chosen, config.deterministic))


def held_to_plain_attention(
    kind: Kind, name: Backend, heads: Heads, device: torch.device, dtype: str, *, deterministic: bool
) -> str:
    """How near a backend is to plain attention, in words.

    Raises:
        RunError: it is wrong, or it does not run; with the backend to choose instead.
    """
    try:
        checked = check(name, heads, device, dtype, deterministic=deterministic)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise _wrong(kind, name, heads, f"it does not run: {said[0]}") from error
    if not checked.right:
        raise _wrong(kind, name, heads, str(checked))
    return str(checked)


def _wrong(kind: Kind, name: Backend, heads: Heads, how: str) -> RunError:
    others = [other for other in PREFERENCES[kind].order if other != name]
    key = "backend" if kind == "full" else "window_backend"
    return RunError(
        f"attention backend '{name}' fails its check on {heads}: {how}",
        "Before training each backend is compared with plain attention on random numbers of the model's shape.",
        f"Set gpt-oss-attention.{key} to {' or '.join(others[-2:])}, and report this.",
    )


def _records(
    model: Model, kinds: dict[Kind, dict[str, Module]], reasons: dict[Kind, str], named: tuple[str, MasklessAttention]
) -> list[ModulePatch]:
    name, function = named

    def replace(module: Module) -> Any:
        return SeamChange(
            seam=SEAM,
            holder=model.module.config,
            attribute="_attn_implementation",
            value=name,
            calls=function.counter(module),
        )

    def record(kind: Kind, members: dict[str, Module]) -> ModulePatch:
        return ModulePatch(
            slot="attention",
            target=lambda name, _: name in members,
            replace=replace,
            reason=reasons[kind],
            source=SOURCE,
            requires=frozenset({"attention_sinks"}),
        )

    return [record(kind, members) for kind, members in kinds.items()]


def _function(chosen: dict[Kind, Backend], deterministic: bool) -> tuple[str, MasklessAttention]:
    any_kind = next(iter(chosen.values()))
    full, window = chosen.get("full", any_kind), chosen.get("window", any_kind)
    name = f"pegbox_sinks_{SHORT[full]}_{SHORT[window]}{'_deterministic' * deterministic}"
    return name, registered(name, lambda: MasklessAttention(full, window, deterministic=deterministic))


def _undecided() -> tuple[str, MasklessAttention]:
    """What stands for backends where there is no device; a model without weights computes nothing."""
    name = "pegbox_sinks_undecided"
    return name, registered(name, lambda: MasklessAttention("eager", "eager", deterministic=True))


def _expected(kind: Kind, config: GptOssAttentionConfig, heads: Heads) -> str:
    """What is known without a device."""
    wanted, preference = config.wanted(kind), PREFERENCES[kind]
    how = ", deterministic" * config.deterministic
    if wanted != "auto":
        return f"{wanted}{how}: {heads}; checked when the run starts"
    order = ", else ".join(preference.order)
    return f"auto{how}: {order}, whichever can where the run is ({preference.reason}): {heads}; checked at its start"


def _heads(layer: Any) -> Heads:
    config = layer.config
    return Heads(config.num_attention_heads, config.num_key_value_heads, layer.head_dim, window_of(layer))


def _dtype(model: Model) -> torch.dtype:
    """Of what queries are made of: the embeddings' output runs through every layer."""
    return next(p.dtype for p in model.module.parameters() if p.is_floating_point())


def _require_no_dropout(model: Model) -> None:
    dropout = getattr(model.module.config.get_text_config(), "attention_dropout", 0.0)
    if dropout:
        raise ConfigError(
            f"{model.name} drops {dropout} of its attention weights (attention_dropout of its config)",
            "Kernels that never lay attention weights out cannot drop them.",
            "Set hf.config_overrides: {attention_dropout: 0.0}, or remove gpt-oss-attention from plugins.",
        )


def _refusal() -> ModulePatch:
    """A record that no model without sinks takes: the error names what is missing."""
    return ModulePatch(
        slot="attention",
        target=f"*.{SINKS}",
        replace=lambda module: module,
        reason="Its kernels compute attention with sinks; for other models there is the plugin attention.",
        requires=frozenset({"attention_sinks"}),
    )
