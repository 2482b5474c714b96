"""Merge and begin anew: the sum of several low-rank updates has a higher rank than each (arXiv:2307.05695, eq. 2).

    every N steps, once the optimizer has stepped:   W <- W + s B A,   A <- random,   B <- 0
    and of the optimizer's states of A and B most is set to zero, so that they do not lead back to the old directions

The function is the same before and after. The base is what has been learned, so checkpoints hold its moved weights, and
the export is the whole model with the last adapter merged.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pegbox.errors import RunError

from pegbox_relora.conditions import ADAPTER, base_weight, require_plain_adapter
from pegbox_relora.config import ReloraConfig
from pegbox_relora.pruning import prune

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module, Parameter
    from torch.optim import Optimizer


class Restarts:
    """The adapted layers of a model, and how often they were begun anew.

    Raises:
        UserError: a layer cannot be merged and begun anew.
    """

    def __init__(self, ctx: Context, model: Model) -> None:
        self._ctx, self._settings = ctx, ctx.section(ReloraConfig)
        self._layers = _layers(model.module)
        require_plain_adapter(model, self._layers)
        self._init = model.module.peft_config[ADAPTER].init_lora_weights
        self._count = 0

    def after(self, step: int, optimizer: Optimizer) -> None:
        """Restart if it is time."""
        if step % self._settings.every == 0:
            self._merge()
            self._begin_anew(step)
            prune(self._settings, optimizer, self._factors(), self._ctx.rng("relora/prune", step).seed)
            self._count += 1

    def finish(self, model: Model) -> None:
        """Merge the adapter for good and put the bare layers back in their places."""
        self._merge()
        unwrap(model.module)
        self._layers = []

    def require_whole_weights(self) -> None:
        """Raise if weights are sharded: a part of a weight cannot take the whole update.

        Raises:
            RunError: naming the placement's doing.
        """
        for name, layer in self._layers:
            if hasattr(base_weight(layer), "to_local"):
                raise RunError(
                    f"relora cannot merge into {name}: its weight is sharded over processes",
                    "A merge needs whole weights.",
                    "Train on one device or with DDP: remove the plugin that owns place_model, or set use.",
                )

    def state_dict(self) -> dict[str, object]:
        """The number of restarts and, if there was one, the weights that moved."""
        moved = {key: weight.detach() for key, weight in self._weights().items()} if self._count else {}
        return {"restarts": self._count, "weights": moved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        import torch

        self._count = state_dict["restarts"]
        own = self._weights()
        if state_dict["weights"] and own.keys() != state_dict["weights"].keys():
            raise RunError(
                "the checkpoint holds moved weights of other layers than this run adapts",
                "The base of a run goes on from where the checkpoint left it.",
                "Resume with the config that the checkpoint was made with: see config.yaml beside it.",
            )
        with torch.no_grad():
            for key, weight in state_dict["weights"].items():
                own[key].copy_(weight)

    def _weights(self) -> dict[str, Tensor]:
        return {name: base_weight(layer) for name, layer in self._layers}

    def _factors(self) -> list[Parameter]:
        """A and B of every layer; those of embeddings are parameters, the others inside of linear layers."""
        factors = []
        for _, layer in self._layers:
            for kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
                if ADAPTER in getattr(layer, kind):
                    made = getattr(layer, kind)[ADAPTER]
                    factors.append(getattr(made, "weight", made))
        return factors

    def _merge(self) -> None:
        import torch

        with torch.no_grad():
            for _, layer in self._layers:
                layer.merge(adapter_names=[ADAPTER])
                layer.merged_adapters.clear()

    def _begin_anew(self, step: int) -> None:
        """As the adapter began, with random numbers of this step alone that shift no others."""
        import torch

        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(self._ctx.rng("relora/restart", step).seed)
            for _, layer in self._layers:
                layer.reset_lora_parameters(ADAPTER, self._init)


def _layers(module: Module) -> list[tuple[str, LoraLayer]]:
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in module.named_modules() if isinstance(part, LoraLayer)]


def unwrap(module: Module) -> None:
    """Put base layers in the place of adapted ones, and modules that were trained in full in the place of theirs."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import AuxiliaryTrainingWrapper

    wrapped = [(n, p) for n, p in module.named_modules() if isinstance(p, LoraLayer | AuxiliaryTrainingWrapper)]
    for name, part in wrapped:
        parent, _, child = name.rpartition(".")
        if isinstance(part, AuxiliaryTrainingWrapper):
            bare = part.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=[ADAPTER])
        elif ".base_layer" in name:
            continue
        else:
            bare = part.get_base_layer()
        setattr(module.get_submodule(parent), child, bare)
    module.__dict__.pop("peft_config", None)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = False
