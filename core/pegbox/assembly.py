"""From a request to a model that is ready to train: load, patch, adapt, patch again, place."""

from __future__ import annotations

from pegbox import hooks
from pegbox.context import Context
from pegbox.merging import merge_options
from pegbox.types import Model, ModelRequest


def model_request(ctx: Context, *, meta: bool = False) -> ModelRequest:
    """What the config and the `configure_model` records ask of the policy."""
    wanted, options = ctx.config.run.model, merge_options(ctx.each(hooks.configure_model, ctx))
    return ModelRequest(name=wanted.name, format=wanted.format, revision=wanted.revision, meta=meta, options=options)


def prepare_model(ctx: Context, request: ModelRequest) -> Model:
    """Load, patch, adapt and place one model. Adapters go to the policy only; a model without weights is not placed."""
    patches = ctx.kernel.patches
    model = ctx.call(hooks.load_model, ctx, request)
    patches.apply(model, ctx.each(hooks.patch_attention, ctx, model))
    patches.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    if request.role == "policy" and ctx.owned(hooks.apply_adapters):
        model = ctx.call(hooks.apply_adapters, ctx, model)
    for stage in ("adapted", "recompute", "compile"):
        patches.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
    return model if request.meta else ctx.call(hooks.place_model, ctx, model)
