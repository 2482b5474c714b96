"""What each optimizer of `pytorch_optimizer` takes here, and how it is made.

Only what is tested is offered: exact resume, and the same bits as the library used directly. Weight decay is decoupled
from the gradient in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any

from pegbox.errors import ConfigError
from pegbox.section import Section, setting
from pegbox.types import Record
from pydantic import Field

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]
Two = tuple[Beta, Beta]
Three = tuple[Beta, Beta, Beta]
BETAS = "Decay rates of its running averages, in the order of the paper."


class AdoptOptions(Section):
    """Options of `adopt` (arXiv:2411.02853)."""

    betas: Two = setting((0.9, 0.9999), BETAS, unit="1")
    eps: float = setting(1e-6, "Smallest divisor of a gradient.", unit="1", gt=0)


class CameOptions(Section):
    """Options of `came` (arXiv:2307.02047)."""

    betas: Three = setting((0.9, 0.999, 0.9999), BETAS, unit="1")
    eps1: float = setting(1e-30, "Added to squared gradients.", unit="1", gt=0)
    eps2: float = setting(1e-16, "Added to squared instabilities.", unit="1", gt=0)
    clip_threshold: float = setting(1.0, "Largest root mean square of an update.", unit="1", gt=0)


class LionOptions(Section):
    """Options of `lion` (arXiv:2302.06675); it wants a tenth of AdamW's learning rate."""

    betas: Two = setting((0.9, 0.99), BETAS, unit="1")


class AdemamixOptions(Section):
    """Options of `ademamix` (arXiv:2409.03137)."""

    betas: Three = setting((0.9, 0.999, 0.9999), BETAS, unit="1")
    alpha: float = setting(5.0, "Weight of the slow average.", unit="1", ge=0)
    t_alpha_beta3: float | None = setting(
        None, "Steps over which alpha and beta3 rise to their values.", unit="optimizer steps", gt=0
    )
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class StableAdamwOptions(Section):
    """Options of `stable_adamw` (arXiv:2304.13013)."""

    betas: Two = setting((0.9, 0.99), BETAS, unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class AdanOptions(Section):
    """Options of `adan` (arXiv:2208.06677)."""

    betas: Three = setting((0.98, 0.92, 0.99), BETAS, unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class GrokfastOptions(Section):
    """Options of `grokfast_adamw` (arXiv:2405.20233): slow parts of the gradient count more."""

    betas: Two = setting((0.9, 0.99), BETAS, unit="1")
    grokfast_alpha: float = setting(0.98, "Decay rate of the slow gradient.", unit="1", ge=0, lt=1)
    grokfast_lamb: float = setting(2.0, "Weight of the slow gradient.", unit="1", ge=0)
    grokfast_after_step: int = setting(0, "First step that uses it.", unit="optimizer steps", ge=0)
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class LibraryOptimizer(Record):
    """An optimizer of `pytorch_optimizer`, by the name of its class, and what is fixed here."""

    class_name: str
    options: type[Section]
    doc: str
    fixed: Mapping[str, bool] = field(default_factory=dict)
    steps_sharded: bool = True
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: Section) -> Optimizer:
        import pytorch_optimizer

        if not self.steps_sharded:
            self._refuse_sharded(groups)
        given = {**self.fixed, **options.model_dump()}
        optimizer: Optimizer = getattr(pytorch_optimizer, self.class_name)(list(groups), **given)
        return optimizer

    def _refuse_sharded(self, groups: Sequence[dict[str, Any]]) -> None:
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for group in groups for _, parameter in group["params"]):
            able = ", ".join(name for name, recipe in OPTIMIZERS.items() if recipe.steps_sharded)
            raise ConfigError(
                f"optim.name is {self.class_name} of pytorch_optimizer, but parameters are sharded over processes",
                "It uses operations that torch does not have for sharded tensors.",
                f"Set optim.name to one that steps them ({able}, or adamw), or place the model unsharded.",
            )


def _recipe(
    class_name: str, options: type[Section], doc: str, *, steps_sharded: bool = True, **fixed: bool
) -> LibraryOptimizer:
    return LibraryOptimizer(class_name=class_name, options=options, doc=doc, fixed=fixed, steps_sharded=steps_sharded)


OPTIMIZERS = {
    "adopt": _recipe(
        "ADOPT",
        AdoptOptions,
        "Adam that converges for any second decay rate.",
        weight_decouple=True,
        steps_sharded=False,
    ),
    "came": _recipe(
        "CAME", CameOptions, "Adafactor guided by its own confidence.", weight_decouple=True, steps_sharded=False
    ),
    "lion": _recipe("Lion", LionOptions, "The sign of a running gradient.", weight_decouple=True),
    "ademamix": _recipe("AdEMAMix", AdemamixOptions, "A fast and a slow average.", weight_decouple=True),
    "stable_adamw": _recipe(
        "StableAdamW",
        StableAdamwOptions,
        "AdamW with clipped updates.",
        weight_decouple=True,
        kahan_sum=False,
        steps_sharded=False,
    ),
    "adan": _recipe("Adan", AdanOptions, "Adam with Nesterov momentum.", weight_decouple=True, steps_sharded=False),
    "grokfast_adamw": _recipe(
        "GrokFastAdamW",
        GrokfastOptions,
        "AdamW on amplified slow gradients.",
        weight_decouple=True,
        normalize_lr=False,
    ),
}
