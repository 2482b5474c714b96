"""Plugins whose patches break one promise each. The sound one replaces every RMSNorm by the same computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pegbox.hooks import hookimpl
from pegbox.types import Model, ModulePatch
from torch import Tensor, nn


def norm_of(module: Any, weight: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The forward of an RMSNorm in plain torch."""

    def forward(hidden: Tensor) -> Tensor:
        scale = hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon
        return (module.weight if weight is None else weight) * hidden * torch.rsqrt(scale)

    return forward


class SoundPatches:
    """One patch for each RMSNorm, by another forward on the instance."""

    target = "**norm*"
    reason = "The same norm, written out."

    def replace(self, module: Any) -> Any:
        return norm_of(module)

    @hookimpl
    def patch_modules(self, model: Model, stage: str) -> Sequence[ModulePatch]:
        if stage != "base":
            return []
        return [ModulePatch(slot="norm", target=self.target, replace=self.replace, reason=self.reason)]


class NoPatch(SoundPatches):
    """Patches only a model that has experts."""

    @hookimpl
    def patch_modules(self, model: Model, stage: str) -> Sequence[ModulePatch]:
        return super().patch_modules(model, stage) if "moe" in model.traits else []


class NoReason(SoundPatches):
    reason = " "


class NeverCalled(SoundPatches):
    """Replaces a container whose forward nobody calls."""

    target = "model.layers"

    def replace(self, module: Any) -> Any:
        return lambda *_: None


class ChangedWeights(SoundPatches):
    """Folds a factor into the weights of the module it was given."""

    def replace(self, module: Any) -> Any:
        with torch.no_grad():
            module.weight.mul_(1.5)
        return norm_of(module)


class ChangedConfig(SoundPatches):
    """Writes what it did into the model's config."""

    @hookimpl
    def patch_modules(self, model: Model, stage: str) -> Sequence[ModulePatch]:
        model.module.config.patched_norms = stage
        return super().patch_modules(model, stage)


class ChangedClass(SoundPatches):
    """Assigns to the class of the module."""

    def replace(self, module: Any) -> Any:
        cls = type(module)
        cls.forward = lambda self, hidden: norm_of(self)(hidden) * 1.5
        return norm_of(module)


class LostGradient(SoundPatches):
    """Computes with a copy of the weight."""

    def replace(self, module: Any) -> Any:
        return norm_of(module, module.weight.detach().clone())


class Norm(nn.Module):
    """An RMSNorm that takes the old one's parameter over."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = old.weight, old.variance_epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return norm_of(self)(hidden)


class SoundModules(SoundPatches):
    """The same by another module in the old one's place."""

    def replace(self, module: Any) -> Any:
        return Norm(module)
