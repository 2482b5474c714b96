"""Routers against those of transformers, and the sort that brings the rows of an expert together."""

from __future__ import annotations

import pytest
import torch
from pegbox_kernels.experts import Routing, reference, route

T, E, H, K = 7, 12, 16, 3


def their_router(name: str, **settings: object) -> torch.nn.Module:
    """A router of transformers with random weights."""
    pytest.importorskip("transformers")
    if name == "gpt_oss":
        from transformers import GptOssConfig as Config
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter as Router

        config = Config(num_local_experts=E, num_experts_per_tok=K, hidden_size=H)
    elif name == "qwen3_moe":
        from transformers import Qwen3MoeConfig as Config
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter as Router

        config = Config(num_experts=E, num_experts_per_tok=K, hidden_size=H, **settings)
    elif name == "mixtral":
        from transformers import MixtralConfig as Config
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter as Router

        config = Config(num_local_experts=E, num_experts_per_tok=K, hidden_size=H)
    else:
        from transformers import DeepseekV3Config as Config
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter as Router

        config = Config(
            n_routed_experts=E, num_experts_per_tok=K, hidden_size=H, n_group=1, topk_group=1, norm_topk_prob=True
        )
    router = Router(config)
    for tensor in (*router.parameters(), *router.buffers()):
        torch.nn.init.normal_(tensor, std=0.5)
    return router


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("gpt_oss", {}, {"score": "topk_softmax"}),
        ("qwen3_moe", {"norm_topk_prob": True}, {"score": "softmax", "normalize": True}),
        ("qwen3_moe", {"norm_topk_prob": False}, {"score": "softmax", "normalize": False}),
        ("mixtral", {}, {"score": "softmax", "normalize": True}),
        ("deepseek_v3", {}, {"score": "sigmoid", "normalize": True, "scale": 2.5}),
    ],
)
def test_a_router_gives_the_experts_weights_and_gradients_of_transformers(name: str, theirs: dict, ours: dict) -> None:
    router = their_router(name, **theirs)
    logits, weights, experts = router(torch.randn(T, H))
    logits.retain_grad()
    bias = getattr(router, "e_score_correction_bias", None)
    upstream = torch.randn(T, E)
    leaf = logits.detach().clone().requires_grad_()
    found, chosen = route(leaf, K, bias_E=bias, **ours)
    # Theirs may come in another order.
    dense = torch.zeros(T, E).scatter(1, experts, weights.float())
    torch.testing.assert_close(torch.zeros(T, E).scatter(1, chosen, found.float()), dense)
    (expected,) = torch.autograd.grad((dense * upstream).sum(), logits)
    (gradient,) = torch.autograd.grad((torch.zeros(T, E).scatter(1, chosen, found) * upstream).sum(), leaf)
    torch.testing.assert_close(gradient, expected)


def test_the_bias_of_a_choice_changes_the_experts_and_not_their_weights() -> None:
    logits = torch.randn(T, E)
    bias = torch.zeros(E)
    bias[5] = 100.0
    weights, experts = route(logits, K, score="sigmoid", bias_E=bias)
    assert (experts == 5).any(-1).all()
    torch.testing.assert_close(weights, logits.sigmoid().gather(1, experts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 13}, "top_k is 13: .* 12 experts"),
        ({"score": "relu"}, "score is 'relu'"),
        ({"score": "topk_softmax", "normalize": True}, "Leave it out"),
        ({"bias_E": torch.zeros(3)}, r"bias_E \(3,\)"),
        ({"logits_TE": torch.zeros(2, 3, 4)}, r"logits \(2, 3, 4\)"),
    ],
)
def test_a_wrong_argument_of_a_router_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route(**{"logits_TE": torch.zeros(T, E), "top_k": K, **change})


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(0, 2, 4), (1, 1, 1), (43, 3, 5), (128, 1, 2), (70, 4, 32), (200, 8, 256)]
)
def test_rows_are_sorted_by_expert_and_stay_in_order_within_one(tokens, top_k, experts, device, poison) -> None:
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    with poison():
        found = Routing.of(chosen.to(device), experts)
    order, inverse, offsets = reference.sort_by_expert(chosen, experts)
    rows = int(offsets[-1])
    assert torch.equal(found.order_N[:rows].cpu(), order[:rows])
    assert torch.equal(found.inverse_N.cpu(), inverse)
    assert torch.equal(found.offsets_E.cpu(), offsets)


def test_the_reference_of_the_sort_is_a_stable_sort() -> None:
    chosen = torch.tensor([[2, 0], [4, 2], [0, 2]])
    order, inverse, offsets = reference.sort_by_expert(chosen, 4)
    assert order[:5].tolist() == [1, 4, 0, 3, 5]
    assert inverse.tolist() == [2, 0, -1, 3, 1, 4]
    assert offsets.tolist() == [2, 2, 5, 5]


def test_all_rows_of_one_expert_over_many_blocks_stay_in_order(device) -> None:
    found = Routing.of(torch.full((1000, 2), 3, device=device), 6)
    assert torch.equal(found.order_N.cpu(), torch.arange(2000, dtype=torch.int32))
    assert found.offsets_E.tolist() == [0, 0, 0, 2000, 2000, 2000]


def test_the_sort_passes_opcheck(device) -> None:
    chosen = torch.randint(0, 4, (9, 2), device=device)
    torch.library.opcheck(torch.ops.pegbox_kernels.sort_by_expert.default, (chosen, 4))


def test_indices_of_another_type_or_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="pass \\(tokens, choices\\) in int32 or int64"):
        Routing.of(torch.zeros(4, 2), 3)
    with pytest.raises(ValueError, match=r"experts \(4,\)"):
        Routing.of(torch.zeros(4).long(), 3)
