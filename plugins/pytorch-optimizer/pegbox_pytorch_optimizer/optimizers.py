"""What each optimizer of `pytorch_optimizer` takes here, and how it is made.

Only what is tested is offered: exact resume, and the same bits as the library used directly. Weight decay is decoupled
from the gradient in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pegbox.errors import ConfigError, UserError
from pegbox.section import Section, setting

from pegbox_pytorch_optimizer.matrices import ADAMC, GALORE, NORMUON
from pegbox_pytorch_optimizer.recipe import ADDED, BETAS, Beta, LibraryOptimizer, Three, Two

if TYPE_CHECKING:
    from pegbox.types import Model
    from torch.optim import Optimizer


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


class ProdigyOptions(Section):
    """Options of `prodigy` (arXiv:2306.06101); it finds the size of its steps, and wants a learning rate of 1."""

    betas: Two = setting((0.9, 0.999), BETAS, unit="1")
    beta3: Beta | None = setting(
        None, "Decay rate of its estimate of a distance; the root of beta2 unless set.", unit="1"
    )
    d0: float = setting(1e-6, "First estimate of the distance to a solution.", unit="1", gt=0)
    d_coef: float = setting(1.0, "Factor on the estimate; half or twice for smaller or larger steps.", unit="1", gt=0)
    growth_rate: float | None = setting(
        None, "Largest factor by which the estimate grows in a step; no limit unless set.", unit="1", gt=1
    )
    bias_correction: bool = setting(False, "Correct the averages for their start at zero, as Adam does.")
    safeguard_warmup: bool = setting(False, "Keep the learning rate's warm-up out of the estimate.")
    eps: float = setting(1e-8, ADDED, unit="1", gt=0)


class ProdigyRecipe(LibraryOptimizer):
    """Prodigy: one estimate, and therefore one learning rate, for all parameters."""

    def _make(self, model: Model, groups: list[dict[str, Any]], options: ProdigyOptions) -> Optimizer:
        from pytorch_optimizer import Prodigy

        rates = sorted({group["lr"] for group in groups})
        if len(rates) > 1:
            raise UserError(
                f"optim.name is 'prodigy', but parameters get {len(rates)} learning rates ({rates[0]} to {rates[-1]})",
                "It steps all of them at the size that it finds: those of all groups but the first would do nothing.",
                "Remove learning rates and scales of groups and embeddings, or set optim.name to adamw.",
            )
        given = options.model_dump(exclude={"growth_rate"})
        growth = float("inf") if options.growth_rate is None else options.growth_rate
        return Prodigy(groups, growth_rate=growth, **given)


class SoapOptions(Section):
    """Options of `soap` (arXiv:2409.11321); its first step only measures."""

    betas: Two = setting((0.95, 0.95), BETAS, unit="1")
    shampoo_beta: Beta | None = setting(
        None, "Decay rate of the averages that give the bases; the second of betas unless set.", unit="1"
    )
    precondition_frequency: int = setting(10, "How often the bases are made anew.", unit="optimizer steps", ge=1)
    max_precondition_dim: int = setting(10000, "Largest side of a matrix that gets a basis.", unit="numbers", ge=1)
    precondition_1d: bool = setting(False, "Vectors get a basis too.")
    normalize_gradient: bool = setting(False, "Give each update a root mean square of one.")
    eps: float = setting(1e-8, ADDED, unit="1", gt=0)


class FlashAdamwOptions(Section):
    """Options of `flash_adamw` (arXiv:2602.23349)."""

    betas: Two = setting((0.9, 0.999), BETAS, unit="1")
    eps: float = setting(1e-8, ADDED, unit="1", gt=0)
    master_weight_bits: Literal[24, 32] | None = setting(
        None, "Precision that 16-bit parameters get by a correction kept beside them; none unless set.", unit="bits"
    )


class FlashAdamwRecipe(LibraryOptimizer):
    """AdamW with 8-bit averages."""

    def _make(self, model: Model, groups: list[dict[str, Any]], options: FlashAdamwOptions) -> Optimizer:
        bits = options.master_weight_bits
        if bits and all(p.element_size() > 2 for group in groups for _, p in group["params"]):
            raise ConfigError(
                f"optim.options.master_weight_bits is {bits}, but no trained parameter has 16 bits",
                "The correction is for what 16 bits cannot hold: it would do nothing.",
                "Remove optim.options.master_weight_bits.",
            )
        return super()._make(model, groups, options)


def _recipe(
    class_name: str, options: type[Section], doc: str, *, steps_sharded: bool = True, **fixed: bool | str
) -> LibraryOptimizer:
    return LibraryOptimizer(class_name=class_name, options=options, doc=doc, fixed=fixed, steps_sharded=steps_sharded)


OPTIMIZERS: dict[str, LibraryOptimizer] = {
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
    "prodigy": ProdigyRecipe(
        class_name="Prodigy", options=ProdigyOptions, doc="Adam that finds its own step size.", steps_sharded=False
    ),
    "soap": _recipe("SOAP", SoapOptions, "Adam in the bases of Shampoo.", steps_sharded=False),
    "flash_adamw": FlashAdamwRecipe(
        class_name="FlashAdamW", options=FlashAdamwOptions, doc="AdamW with 8-bit averages.", steps_sharded=False
    ),
    "galore": GALORE,
    "adamc": ADAMC,
    "normuon": NORMUON,
}
