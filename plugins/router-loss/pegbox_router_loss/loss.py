"""The load-balancing loss: experts should be chosen equally often, and with equal probability.

Over a set of tokens, all layers together, with E experts of which k are chosen,

    f_e = share of the tokens that chose expert e        P_e = mean probability of expert e
    loss = E * sum over e of f_e * P_e                   (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6)

as `load_balancing_loss_func` of transformers has it: k at perfect balance, padding left out, gradients through P
alone.

It is a product of two means, so it does depend on which tokens are taken together. `over: micro_batch` takes those of
a micro-batch, equal to transformers on each one; the step's value is the mean over its micro-batches, weighed by
trained tokens, and another split gives another value. `over: document` takes each row or packed document alone
(sequence-wise balance, DeepSeek-V3, arXiv:2412.19437, section 2.1.2) and is the same for every split into micro-
batches and processes, packed or not. A document weighs as many times as it has trained tokens, as in the other
losses; so padding and documents without trained tokens weigh nothing.

    B  rows    T  tokens    E  experts    D  sets of tokens (documents, or one)    N  trained tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pegbox.errors import ConfigError, PluginError
from pegbox.record import Stateful
from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term

from pegbox_router_loss.config import RouterLossConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Loss, Model
    from torch import Tensor
    from transformers import PretrainedConfig

TERM = "router"
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts", "moe_k")


def with_router_loss(ctx: Context, model: Model, inner: Loss) -> Loss:
    """The loss with one more term.

    Raises:
        ConfigError: the model has no experts, or does not say what the config leaves open.
        PluginError: the loss has a term of this name already.
    """
    settings = ctx.section(RouterLossConfig)
    if "moe" not in model.traits:
        raise ConfigError(
            f"{model.name} has no experts, and the plugin router-loss is listed",
            "Only a mixture of experts has routers to balance.",
            "Remove router-loss from plugins.",
        )
    config = model.module.config.get_text_config()
    weight = settings.coefficient or getattr(config, "router_aux_loss_coef", None)
    if not weight:
        raise ConfigError(
            f"router-loss.coefficient is not set, and the config of {model.name} has no router_aux_loss_coef",
            "There is no usual value: models were trained with 0.001 to 0.02.",
            "Set router-loss.coefficient, e.g. to 0.001.",
        )
    kind = StatefulRouterLoss if isinstance(inner, Stateful) else RouterLoss
    return kind(inner, float(weight), _chosen(config, model), settings.over)


def _chosen(config: PretrainedConfig, model: Model) -> int:
    for name in CHOSEN:
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ConfigError(
        f"the config of {model.name} does not say how many experts a token chooses",
        f"It has none of {', '.join(CHOSEN)}.",
        "Remove router-loss from plugins.",
    )


class RouterLoss:
    """Another loss with the term `router`.

    Args:
        inner: the other loss.
        weight: of the term.
        chosen: experts that a token chooses.
        over: which tokens are taken together.
    """

    def __init__(self, inner: Loss, weight: float, chosen: int, over: Literal["micro_batch", "document"]) -> None:
        self.inner, self.weight, self.chosen, self.over = inner, weight, chosen, over
        self.needs: frozenset[Need] = inner.needs | {"router_logits"}
        self.scope: Literal["token", "batch"] = inner.scope

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """The other loss's counts, and the number of trained tokens."""
        counts = self.inner.counts(batch)
        if TERM in counts:
            raise PluginError(
                f"the loss has a term '{TERM}' of its own",
                "Two terms of one name cannot be told apart.",
                "Remove router-loss from plugins.",
            )
        return {**counts, TERM: float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The other loss's terms and this one, over one micro-batch."""
        assert outputs.router_logits is not None, "the loop provides every need"
        output = self.inner(batch, outputs)
        total = balance_total(outputs.router_logits, batch, self.chosen, self.over)
        term = Term(name=TERM, total=total, count=float(batch.trained_tokens), weight=self.weight)
        return replace(output, terms=(*output.terms, term))


class StatefulRouterLoss(RouterLoss):
    """The same around a loss that has state, which stays that loss's own."""

    def state_dict(self) -> dict[str, object]:
        return self.inner.state_dict()  # type: ignore[attr-defined, no-any-return]

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.inner.load_state_dict(state_dict)  # type: ignore[attr-defined]


def balance_total(
    router_logits: tuple[Tensor, ...], batch: Batch, chosen: int, over: Literal["micro_batch", "document"]
) -> Tensor:
    """The loss of each set of tokens times its trained tokens, summed.

    Args:
        router_logits: of each layer, `(B * T, E)` or `(B, T, E)`.
        batch: says which tokens are real, trained, and of which document.
        chosen: experts that a token chooses.
        over: the sets.
    """
    import torch

    sets, set_of_token = _sets(batch, over)
    real = batch.attention_mask_BT
    device = router_logits[0].device
    real_BT1 = torch.ones(batch.input_ids_BT.numel(), 1, device=device) if real is None else real.reshape(-1, 1).float()
    experts = router_logits[0].shape[-1]
    zero_DE = torch.zeros(sets, experts, device=device)
    often_DE, probability_DE = zero_DE, zero_DE
    for logits in router_logits:
        probabilities = torch.softmax(logits.reshape(-1, experts), dim=-1)
        picked = torch.zeros_like(probabilities, dtype=torch.float32)
        picked.scatter_(1, probabilities.topk(chosen, dim=-1).indices, 1.0)
        often_DE = often_DE.index_add(0, set_of_token, picked * real_BT1)
        probability_DE = probability_DE.index_add(0, set_of_token, probabilities.float() * real_BT1)
    tokens_D = torch.zeros(sets, 1, device=device).index_add(0, set_of_token, real_BT1)
    seen_D1 = (tokens_D * len(router_logits)).clamp(min=1.0)
    loss_D = experts * ((often_DE / seen_D1) * (probability_DE / seen_D1)).sum(-1)
    trained_N = set_of_token[batch.trained_N]
    trained_D = torch.zeros(sets, device=device).index_add(
        0, trained_N, torch.ones_like(trained_N, dtype=torch.float32)
    )
    return (loss_D * trained_D).sum()


def _sets(batch: Batch, over: str) -> tuple[int, Tensor]:
    """How many sets of tokens there are, and the set of each of the B * T tokens; the device is not waited for."""
    import torch

    rows, tokens = batch.input_ids_BT.shape
    places = torch.arange(rows * tokens, device=batch.input_ids_BT.device)
    if over == "micro_batch":
        return 1, torch.zeros_like(places)
    if batch.cu_seqlens_S is None:
        return rows, places // tokens
    inner_borders = batch.cu_seqlens_S[1:-1].long().contiguous()
    return len(batch.cu_seqlens_S) - 1, torch.bucketize(places, inner_borders, right=True)
