"""Optimizers that treat hidden matrices otherwise than the rest: GaLore, AdamC and NorMuon.

Hidden matrices are the trained parameters of two dimensions that are not of the embeddings or the head. Vectors,
embeddings, head and stacked experts get the ordinary Adam that each of these libraries' classes has within it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pegbox.errors import UserError
from pegbox.section import Section, setting

from pegbox_pytorch_optimizer.recipe import ADDED, BETAS, Beta, LibraryOptimizer, Two

if TYPE_CHECKING:
    from pegbox.types import Model
    from torch.nn import Parameter
    from torch.optim import Optimizer


class GaloreOptions(Section):
    """Options of `galore` (arXiv:2403.03507)."""

    rank: int = setting(128, "Rank to which gradients are projected; smaller matrices are left alone.", unit="1", ge=1)
    update_proj_gap: int = setting(200, "How often the projection is made anew.", unit="optimizer steps", ge=1)
    scale: float = setting(0.25, "Factor on updates that come back from the projection.", unit="1", gt=0)
    projection_type: Literal["std", "reverse_std", "right", "left", "full"] = setting(
        "std", "Side that is projected: the shorter one's basis (std), the other, always one of them, or both."
    )
    betas: Two = setting((0.9, 0.999), BETAS, unit="1")
    eps: float = setting(1e-6, ADDED, unit="1", gt=0)


class GaloreRecipe(LibraryOptimizer):
    """GaLore, whose state is plain."""

    def _make(self, model: Model, groups: list[dict[str, Any]], options: GaloreOptions) -> Optimizer:
        from pegbox_pytorch_optimizer.galore import PlainGaLore

        projection = options.model_dump(include={"rank", "update_proj_gap", "scale", "projection_type"})
        projected, rest = split(model, groups, lambda parameter: min(parameter.shape) > options.rank)
        if not projected:
            raise UserError(
                f"optim.name is 'galore', but {model.name} trains no hidden matrix larger than rank {options.rank}",
                "Gradients of smaller matrices, such as those of adapters, have nothing to project: it would be AdamW.",
                "Lower optim.options.rank, train whole matrices, or set optim.name to adamw.",
            )
        parts = [*({**group, **projection} for group in projected), *rest]
        return PlainGaLore(parts, betas=options.betas, eps=options.eps)


class AdamcOptions(Section):
    """Options of `adamc` (arXiv:2506.02285)."""

    betas: Two = setting((0.9, 0.999), BETAS, unit="1")
    eps: float = setting(1e-8, ADDED, unit="1", gt=0)


class AdamcRecipe(LibraryOptimizer):
    """AdamC: hidden matrices decay by lr * lr / peak instead of lr, each group by its own peak."""

    def _make(self, model: Model, groups: list[dict[str, Any]], options: AdamcOptions) -> Optimizer:
        from pytorch_optimizer import AdamC

        hidden, rest = split(model, groups)
        peak = max((group["lr"] for group in hidden if group["weight_decay"]), default=0.0)
        if not peak:
            raise UserError(
                f"optim.name is 'adamc', but no hidden matrix that {model.name} trains is decayed",
                "AdamC differs from AdamW only in how hidden matrices decay: it would be AdamW.",
                "Set optim.weight_decay, or optim.name to adamw.",
            )
        # The class knows one peak; a group with another learning rate gets its own through its weight decay.
        normalized = [
            {**group, "normalized": True, "weight_decay": group["weight_decay"] * (peak / (group["lr"] or peak))}
            for group in hidden
        ]
        return AdamC([*normalized, *rest], lr=peak, betas=options.betas, eps=options.eps)


class NormuonOptions(Section):
    """Options of `normuon` (arXiv:2510.05491): of NorMuon itself, and of the AdamW for the rest."""

    momentum: float = setting(0.95, "Decay rate of the running gradient.", unit="1", ge=0, lt=1)
    beta2: Beta = setting(0.95, "Decay rate of the mean square of a row of the orthogonal update.", unit="1")
    nesterov: bool = setting(True, "Look one step ahead.")
    ns_steps: int = setting(5, "Newton-Schulz iterations that make an update orthogonal.", unit="iterations", ge=1)
    betas: Two = setting((0.9, 0.95), "Decay rates of the AdamW for the rest.", unit="1")
    eps: float = setting(1e-8, "Added to the root of the second average in the AdamW for the rest.", unit="1", gt=0)
    adamw_scale: float = setting(1.0, "Learning rate of the AdamW for the rest, as a factor.", unit="1", gt=0)


class NormuonRecipe(LibraryOptimizer):
    """NorMuon for hidden matrices, at the size of an AdamW update, and AdamW for the rest."""

    def _make(self, model: Model, groups: list[dict[str, Any]], options: NormuonOptions) -> Optimizer:
        from pytorch_optimizer import NorMuon

        hidden, rest = split(model, groups)
        if not hidden:
            raise UserError(
                f"optim.name is 'normuon', but {model.name} trains no hidden matrix",
                "Embeddings, the head, vectors and stacked experts are stepped by AdamW: NorMuon would do nothing.",
                "Set optim.name to adamw.",
            )
        adamw = {"use_muon": False, "betas": options.betas, "eps": options.eps}
        parts = [{**group, "use_muon": True} for group in hidden]
        parts += [{**group, **adamw, "lr": group["lr"] * options.adamw_scale} for group in rest]
        given = options.model_dump(include={"momentum", "beta2", "nesterov", "ns_steps"})
        return NorMuon(parts, update_scale="match_rms", **given)


def split(
    model: Model, groups: list[dict[str, Any]], fits: Callable[[Parameter], bool] = lambda _: True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups of the hidden matrices that fit, and groups of everything else; empty ones are left out."""
    apart = _embeddings(model)
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for group in groups:
        chosen = [p.ndim == 2 and id(p) not in apart and fits(p) for _, p in group["params"]]
        for part, hidden in zip(parts, (True, False), strict=True):
            own = [pair for pair, is_hidden in zip(group["params"], chosen, strict=True) if is_hidden == hidden]
            if own:
                part.append({**group, "params": own})
    return parts


def _embeddings(model: Model) -> set[int]:
    """Ids of the parameters of the model's embeddings and head, adapters of them included."""
    asked = (getattr(model.module, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    parts: list[Any] = [part for ask in asked if ask is not None and (part := ask()) is not None]
    return {id(parameter) for part in parts for parameter in part.parameters()}


GALORE = GaloreRecipe(
    class_name="GaLore", options=GaloreOptions, doc="AdamW on gradients of low rank.", steps_sharded=False
)
ADAMC = AdamcRecipe(class_name="AdamC", options=AdamcOptions, doc="AdamW with decay that follows the schedule.")
NORMUON = NormuonRecipe(
    class_name="NorMuon", options=NormuonOptions, doc="Muon with rows of one size.", steps_sharded=False
)
