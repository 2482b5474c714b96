"""What the hooks do: look at the model's shape first, at the device next, and at what is computed last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.types import ModelOptions, ModelRequest, ModulePatch

from pegbox_attention.capabilities import Asked, asked_by, place_of, require, require_installed, require_known
from pegbox_attention.config import AttentionConfig
from pegbox_attention.patching import OWN, hold_to_plain_attention, name_in_transformers, patches, register

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model


def asked(ctx: Context) -> Asked:
    """What the run's model asks, from its shape on the meta device."""
    wanted = ctx.config.run.model
    request = ModelRequest(name=wanted.name, format=wanted.format, revision=wanted.revision, meta=True)
    return asked_by(ctx.call(hooks.load_model, ctx, request))


def require_model(ctx: Context, known: Asked) -> None:
    """Raise unless the implementation is installed and can serve the model, wherever it runs."""
    config = ctx.section(AttentionConfig)
    require_known(config.implementation)
    require_installed(config.implementation)
    require(config.implementation, known, None, deterministic=config.deterministic)


def options(ctx: Context, known: Asked | None) -> ModelOptions:
    """The name for transformers, once the implementation is known to serve the model, and the device if there is one.

    A plan has no device, and may be made where nothing is installed that the run will need.
    """
    config, runtime = ctx.section(AttentionConfig), vars(ctx).get("runtime")
    require_known(config.implementation)
    known = known or asked(ctx)
    if runtime is not None:
        require_installed(config.implementation)
    place = None if runtime is None else place_of(runtime, known)
    require(config.implementation, known, place, deterministic=config.deterministic)
    register(config)
    return ModelOptions(attention=name_in_transformers(config))


def records(ctx: Context, model: Model) -> list[ModulePatch]:
    """The record for the policy, and for a second model that was loaded with the same attention."""
    config = ctx.section(AttentionConfig)
    if model.role != "policy" and model.module.config._attn_implementation != name_in_transformers(config):
        return []
    known, runtime = asked_by(model), vars(ctx).get("runtime")
    require(config.implementation, known, None, deterministic=config.deterministic)
    if runtime is None or config.implementation not in OWN:
        return patches(config, model)
    said = hold_to_plain_attention(config, model, known, runtime)
    if runtime.rank == 0:
        ctx.log.info("attention of %s: %s: %s", model.name, config.implementation, said)
    return patches(config, model, said)
