"""Tiny models that PEFT adapts, patched by the plugin or left as they are."""

from __future__ import annotations

from typing import Any

import torch
from pegbox import hooks
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model


def adapted(model: Model | None = None, **lora: Any) -> Model:
    """A tiny model under an adapter whose every parameter is moved off its beginning."""
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora"], "lora": {"r": 4, "alpha": 6, **lora}})
    model = ctx.call(hooks.apply_adapters, ctx, model or tiny_model())
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
    return model


def patch(model: Model, *before: str, **settings: Any) -> PatchLog:
    """Apply the plugin's records."""
    plugins = ["lora", *before, "lora-kernels"]
    ctx = compose({"model": {"name": "tiny"}, "plugins": plugins, "lora-kernels": settings})
    log = PatchLog()
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "adapted"))
    return log


def outcome(model: Model, seed: int = 11) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities of a batch, and every gradient of their weighted sum."""
    torch.manual_seed(seed)
    logps = model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N
    assert logps is not None
    (logps.double() * torch.linspace(-1, 2, len(logps)).double()).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    return logps.detach(), gradients
