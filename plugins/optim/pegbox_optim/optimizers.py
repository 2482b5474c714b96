"""The optimizers of torch as items: options, and how each is made.

| name | source |
|---|---|
| `adamw` | Loshchilov and Hutter, arXiv:1711.05101 |
| `sgd` | stochastic gradient descent, with momentum |
| `adafactor` | Shazeer and Stern, arXiv:1804.04235: the second average is kept as a row and a column |
| `rmsprop` | Tieleman and Hinton 2012: the gradient over the root of its average square |
| `adagrad` | Duchi et al. 2011: the gradient over the root of the sum of its squares |
| `muon` | Jordan et al. 2024 and Liu et al., arXiv:2502.16982: see muon.py |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pegbox.record import Record
from pegbox.section import Section, setting
from pydantic import Field, model_validator

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamwOptions(Section):
    """Options of `adamw`."""

    betas: tuple[Beta, Beta] = setting(
        (0.9, 0.999), "Decay rates of the averages of the gradient and of its square.", unit="1"
    )
    eps: float = setting(1e-8, "Added to the root of the second average before dividing by it.", unit="1", gt=0)
    amsgrad: bool = setting(False, "Divide by the largest second average so far.")
    fused: bool | None = setting(
        None, "Use torch's fused implementation; by default where every parameter's device has it."
    )


class Adamw(Record):
    """AdamW of torch."""

    options: type[Section] = AdamwOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: AdamwOptions) -> Optimizer:
        from torch.optim import AdamW

        from pegbox_optim.adamw import is_fused

        fused = is_fused(options.fused, groups)
        return AdamW(groups, betas=options.betas, eps=options.eps, amsgrad=options.amsgrad, fused=fused)


class SgdOptions(Section):
    """Options of `sgd`."""

    momentum: float = setting(0.0, "Decay rate of the running gradient.", unit="1", ge=0, lt=1)
    dampening: float = setting(0.0, "Part of the gradient that does not enter the running one.", unit="1", ge=0, le=1)
    nesterov: bool = setting(False, "Look one step ahead.")

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SgdOptions:
        if self.nesterov and (self.momentum == 0 or self.dampening):
            raise ValueError(
                f"nesterov needs a momentum and no dampening, but momentum is {self.momentum} and dampening "
                f"{self.dampening}; set momentum to 0.9 and dampening to 0"
            )
        return self


class Sgd(Record):
    """SGD of torch."""

    options: type[Section] = SgdOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: SgdOptions) -> Optimizer:
        from torch.optim import SGD

        return SGD(groups, momentum=options.momentum, dampening=options.dampening, nesterov=options.nesterov)


class AdafactorOptions(Section):
    """Options of `adafactor`."""

    beta2_decay: float = setting(-0.8, "The second average of step t decays by 1 - t to this power.", unit="1", le=0)
    eps1: float | None = setting(
        None, "Smallest squared gradient; the square of the dtype's precision unless set.", unit="1", gt=0
    )
    eps2: float = setting(1e-3, "Smallest scale of a parameter for its relative step.", unit="1", gt=0)
    clip: float = setting(1.0, "Largest root mean square of an update.", unit="1", ge=1)


class Adafactor(Record):
    """Adafactor of torch: steps are relative to the size of a parameter."""

    options: type[Section] = AdafactorOptions
    schedules: tuple[str, ...] | None = None

    def build(
        self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: AdafactorOptions
    ) -> Optimizer:
        from torch.optim import Adafactor as TorchAdafactor

        from pegbox_optim.groups import refuse_sharded

        refuse_sharded("adafactor", groups)
        eps = (options.eps1, options.eps2)
        return TorchAdafactor(groups, beta2_decay=options.beta2_decay, eps=eps, d=options.clip)


class RmspropOptions(Section):
    """Options of `rmsprop`."""

    alpha: Beta = setting(0.99, "Decay rate of the average of the squared gradient.", unit="1")
    eps: float = setting(1e-8, "Added to the root of the average before dividing by it.", unit="1", gt=0)
    momentum: float = setting(0.0, "Decay rate of the running update.", unit="1", ge=0, lt=1)
    centered: bool = setting(False, "Divide by the spread of the gradient, without its mean.")


class Rmsprop(Record):
    """RMSprop of torch; its weight decay is added to the gradient."""

    options: type[Section] = RmspropOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: RmspropOptions) -> Optimizer:
        from torch.optim import RMSprop

        return RMSprop(groups, **options.model_dump())


class AdagradOptions(Section):
    """Options of `adagrad`."""

    lr_decay: float = setting(
        0.0, "The learning rate of step t is divided by 1 + (t - 1) times this.", unit="1 / optimizer steps", ge=0
    )
    initial_accumulator_value: float = setting(0.0, "What the sum of squared gradients begins with.", unit="1", ge=0)
    eps: float = setting(1e-10, "Added to the root of the sum before dividing by it.", unit="1", gt=0)


class Adagrad(Record):
    """Adagrad of torch; its weight decay is added to the gradient."""

    options: type[Section] = AdagradOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: AdagradOptions) -> Optimizer:
        from torch.optim import Adagrad as TorchAdagrad

        return TorchAdagrad(groups, **options.model_dump())


class MuonOptions(Section):
    """Options of `muon`: of Muon itself, and of the AdamW for what Muon is not for."""

    momentum: float = setting(0.95, "Decay rate of the running gradient.", unit="1", ge=0, lt=1)
    nesterov: bool = setting(True, "Look one step ahead.")
    ns_steps: int = setting(5, "Newton-Schulz iterations that make an update orthogonal.", unit="iterations", ge=1)
    adjust: Literal["match_rms_adamw", "original"] = setting(
        "match_rms_adamw",
        "Scale of an update: of the size of an AdamW update, so that one learning rate serves both (arXiv:2502.16982), "
        "or as first published.",
    )
    betas: tuple[Beta, Beta] = setting((0.9, 0.95), "Decay rates of the AdamW for the rest.", unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average in the AdamW for the rest.", unit="1", gt=0)
    adamw_scale: float = setting(1.0, "Learning rate of the AdamW for the rest, as a factor.", unit="1", gt=0)


class Muon(Record):
    """Muon for hidden matrices, AdamW for the rest, both of torch, as one optimizer."""

    options: type[Section] = MuonOptions
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: MuonOptions) -> Optimizer:
        from pegbox_optim.groups import refuse_sharded
        from pegbox_optim.muon import build_muon

        refuse_sharded("muon", groups)
        return build_muon(model, groups, options)


ADAMW, SGD, ADAFACTOR, MUON, RMSPROP, ADAGRAD = Adamw(), Sgd(), Adafactor(), Muon(), Rmsprop(), Adagrad()
