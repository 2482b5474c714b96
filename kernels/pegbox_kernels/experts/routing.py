"""Which experts a token goes to, with what weight, and in what order its rows lie.

`route` is the router of each family in plain, differentiable PyTorch; `Routing` is the order of all chosen rows by
expert, made once by a counting sort that never asks the device for a value, and used by forward, recomputation and
backward.

Shapes: T tokens, E experts, K choices of a token, N = T K rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pegbox_kernels.dispatch import runs_kernels
from pegbox_kernels.experts import reference

Score = Literal["softmax", "sigmoid", "topk_softmax"]
TINY = 1e-20
"""Keeps a sum of sigmoid scores from dividing by zero, as DeepSeek-V3's router does."""


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    normalize: bool = False,
    bias_E: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights, differentiable in the logits.

    | family | score | normalize | more |
    |---|---|---|---|
    | gpt-oss | `topk_softmax` | | |
    | Mixtral | `softmax` | True | |
    | Qwen3-MoE | `softmax` | the configuration's `norm_topk_prob` | |
    | DeepSeek-V3, GLM-4 MoE (one group) | `sigmoid` | True | `bias_E`, `scale` |

    Args:
        logits_TE: (T, E).
        top_k: experts of a token, at most E.
        score: `softmax` over all experts in fp32; `sigmoid` of each in fp32; `topk_softmax` over the chosen, in the
            dtype of the logits.
        normalize: divide the chosen weights by their sum (`topk_softmax` sums to one already: refused).
        bias_E: (E,), added to the scores for the choice alone: the weights do not see it, and it has no gradient.
        scale: multiplies the weights.

    Returns:
        weights (T, K), in fp32 (`topk_softmax`: the dtype of the logits), and experts (T, K), int64, by falling score.

    Raises:
        ValueError: shapes or options that do not fit.
    """
    _check(logits_TE, top_k, score, normalize, bias_E)
    if score == "topk_softmax":
        choice_TE = logits_TE if bias_E is None else logits_TE + bias_E
        experts_TK = choice_TE.detach().topk(top_k, dim=-1).indices
        weights_TK = logits_TE.gather(-1, experts_TK).softmax(-1)
        return (weights_TK if scale == 1.0 else weights_TK * scale), experts_TK
    logits_TE = logits_TE.float() if logits_TE.dtype != torch.float64 else logits_TE
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    experts_TK = choice_TE.detach().topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, experts_TK)
    if normalize:
        total_T1 = weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 if score == "softmax" else total_T1 + TINY)
    return (weights_TK if scale == 1.0 else weights_TK * scale), experts_TK


def _check(logits_TE: Tensor, top_k: int, score: str, normalize: bool, bias_E: Tensor | None) -> None:
    if logits_TE.ndim != 2 or not logits_TE.is_floating_point():
        raise ValueError(f"logits {tuple(logits_TE.shape)}, {logits_TE.dtype}: pass floating-point (tokens, experts).")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k is {top_k}: it must be between 1 and the {logits_TE.shape[1]} experts.")
    if score not in ("softmax", "sigmoid", "topk_softmax"):
        raise ValueError(f"score is {score!r}: write softmax, sigmoid or topk_softmax.")
    if score == "topk_softmax" and normalize:
        raise ValueError("normalize=True with score='topk_softmax': its weights sum to one. Leave it out.")
    if bias_E is not None and bias_E.shape != logits_TE.shape[1:]:
        raise ValueError(f"bias_E {tuple(bias_E.shape)}: it needs one value for each of {logits_TE.shape[1]} experts.")


class Routing(NamedTuple):
    """Where the rows of each expert lie once all chosen rows are sorted by expert, equal ones in their old order.

    Attributes:
        order_N: (N,) int32; sorted row p is choice `order[p]` of the flattened (T, K).
        inverse_N: (N,) int32; choice i is sorted row `inverse[i]`, or -1 if its index is no expert.
        offsets_E: (E,) int32; expert e holds sorted rows from `offsets[e - 1]` (0 for the first) up to `offsets[e]`.
            Rows from `offsets[-1]` on are no expert's; `order` says nothing of them.
    """

    order_N: Tensor
    inverse_N: Tensor
    offsets_E: Tensor

    @classmethod
    def of(cls, experts_TK: Tensor, experts: int) -> Routing:
        """Sort (T, K) indices of `experts` experts; an index that is none of them gets no row.

        Raises:
            ValueError: indices are not integers or not two-dimensional.
        """
        if experts_TK.ndim != 2 or experts_TK.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"experts {tuple(experts_TK.shape)}, {experts_TK.dtype}: pass (tokens, choices) in int32 or int64."
            )
        return cls(*_sort(experts_TK, experts))


@torch.library.custom_op(
    "pegbox_kernels::sort_by_expert",
    mutates_args=(),
    schema="(Tensor experts_TK, int experts) -> (Tensor, Tensor, Tensor)",
)
def _sort(experts_TK, experts):  # type: ignore[no-untyped-def]
    if runs_kernels(experts_TK):
        from pegbox_kernels.experts import sorting

        return sorting.sort_by_expert(experts_TK, experts)
    return reference.sort_by_expert(experts_TK, experts)


@_sort.register_fake
def _(experts_TK, experts):  # type: ignore[no-untyped-def]
    rows = experts_TK.numel()
    return (
        experts_TK.new_empty(rows, dtype=torch.int32),
        experts_TK.new_empty(rows, dtype=torch.int32),
        experts_TK.new_empty(experts, dtype=torch.int32),
    )
