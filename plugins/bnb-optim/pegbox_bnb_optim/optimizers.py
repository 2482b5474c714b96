"""What each optimizer of bitsandbytes takes, and how it is made.

An 8-bit optimizer keeps its averages in blocks of 256 numbers with one scale each (Dettmers et al., arXiv:2110.02861).
Embeddings keep 32 bits, as in that paper (section 2.3) and in transformers' Trainer: their gradients are uneven.

bitsandbytes keeps such exceptions in one object for the whole process. Here every optimizer gets its own, so that a
second run in the process sees nothing of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pegbox.errors import ConfigError
from pegbox.record import Record
from pegbox.section import Section, setting
from pydantic import Field

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.optim import Optimizer

Beta = Annotated[float, Field(ge=0, lt=1)]


class StateOptions(Section):
    """How state is kept."""

    min_8bit_size: int = setting(4096, "Parameters with fewer numbers keep 32 bits.", unit="numbers", ge=1)
    embeddings_in_32_bits: bool = setting(True, "Keep the state of embeddings in 32 bits.")


class AdamwOptions(StateOptions):
    """Options of the AdamW variants."""

    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "Decay rates of both averages.", unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class LionOptions(StateOptions):
    """Options of the Lion variants (arXiv:2302.06675); they want a tenth of AdamW's learning rate."""

    betas: tuple[Beta, Beta] = setting((0.9, 0.99), "Weight of the past in a step, and in what is kept.", unit="1")


class AdemamixOptions(StateOptions):
    """Options of the AdEMAMix variants (arXiv:2409.03137)."""

    betas: tuple[Beta, Beta, Beta] = setting((0.9, 0.999, 0.9999), "Decay rates of the three averages.", unit="1")
    alpha: float = setting(5.0, "Weight of the slow average.", unit="1", ge=0)
    t_alpha: int | None = setting(None, "Steps over which alpha rises to its value.", unit="optimizer steps", ge=1)
    t_beta3: int | None = setting(None, "Steps over which beta3 rises to its value.", unit="optimizer steps", ge=1)
    eps: float = setting(1e-8, "Added to the root of the second average.", unit="1", gt=0)


class BnbOptimizer(Record):
    """An optimizer of bitsandbytes, by the name of its class in `bitsandbytes.optim`."""

    class_name: str
    options: type[Section]
    doc: str
    paged: bool = False
    eight_bit: bool = True
    schedules: tuple[str, ...] | None = None

    def build(self, ctx: Context, model: Model, groups: Sequence[dict[str, Any]], options: StateOptions) -> Optimizer:
        """Make it.

        Raises:
            ConfigError: parameters are sharded, or a paged optimizer is asked for without CUDA.
        """
        import bitsandbytes.optim

        parameters = [parameter for group in groups for _, parameter in group["params"]]
        self._refuse_sharded(parameters)
        if self.paged and any(parameter.device.type != "cuda" for parameter in parameters):
            raise ConfigError(
                f"optim.name is a paged optimizer ({self.class_name}), but parameters are on {parameters[0].device}",
                "Paging between GPU and host memory is a service of CUDA.",
                "Remove 'paged_' from optim.name.",
            )
        given = options.model_dump()
        exempt = given.pop("embeddings_in_32_bits")
        optimizer: Any = getattr(bitsandbytes.optim, self.class_name)(list(groups), **given)
        manager = object.__new__(type(optimizer.mng))
        manager.initialize()
        optimizer.mng = manager
        if exempt and self.eight_bit:
            manager.override_config(_embeddings(model), "optim_bits", 32)
        return optimizer

    def _refuse_sharded(self, parameters: Sequence[object]) -> None:
        from torch.distributed.tensor import DTensor

        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ConfigError(
                f"optim.name is {self.class_name} of bitsandbytes, but parameters are sharded over processes",
                "bitsandbytes does not step sharded tensors.",
                "Add torchao-optim to plugins and set optim.name to adamw_torchao_8bit, or place the model unsharded.",
            )


def _embeddings(model: Model) -> list[Any]:
    from torch.nn import Embedding

    return [part.weight for part in model.module.modules() if isinstance(part, Embedding)]


def _recipe(
    class_name: str, options: type[Section], doc: str, *, paged: bool = False, eight_bit: bool = True
) -> BnbOptimizer:
    return BnbOptimizer(class_name=class_name, options=options, doc=doc, paged=paged, eight_bit=eight_bit)


OPTIMIZERS = {
    "adamw_8bit": _recipe("AdamW8bit", AdamwOptions, "AdamW with 8-bit state."),
    "paged_adamw_8bit": _recipe("PagedAdamW8bit", AdamwOptions, "AdamW with 8-bit state that pages out.", paged=True),
    "paged_adamw": _recipe(
        "PagedAdamW32bit", AdamwOptions, "AdamW with 32-bit state that pages out.", paged=True, eight_bit=False
    ),
    "lion_8bit": _recipe("Lion8bit", LionOptions, "Lion with 8-bit state."),
    "paged_lion_8bit": _recipe("PagedLion8bit", LionOptions, "Lion with 8-bit state that pages out.", paged=True),
    "ademamix_8bit": _recipe("AdEMAMix8bit", AdemamixOptions, "AdEMAMix with 8-bit state."),
    "paged_ademamix_8bit": _recipe(
        "PagedAdEMAMix8bit", AdemamixOptions, "AdEMAMix with 8-bit state that pages out.", paged=True
    ),
}
