"""Modules are recognized by what they compute, untouched, whatever they are called and wherever their weights are."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from pegbox_kernels.recognition import mlps, norms, rotary
from pegbox_kernels.recognition.trial import by_rule
from torch import nn

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch, as without a GPU: the interpreter's bits differ now and then."""
    for op in ("rms_norm", "glu", "rope"):
        monkeypatch.setattr(importlib.import_module(f"pegbox_kernels.{op}"), "runs_kernels", lambda _: False)


def of(family: str, name: str):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


@pytest.mark.parametrize(
    ("family", "name", "rule"),
    [
        ("llama", "LlamaRMSNorm", norms.NormRule(1e-5)),
        ("qwen3", "Qwen3RMSNorm", norms.NormRule(1e-5)),
        ("gpt_oss", "GptOssRMSNorm", norms.NormRule(1e-5, cast="gemma")),
        ("gemma3", "Gemma3RMSNorm", norms.NormRule(1e-5, 1.0, "gemma")),
        ("qwen3_next", "Qwen3NextRMSNormGated", norms.NormRule(1e-5, gated=True)),
        ("mamba2", "MambaRMSNormGated", None),
    ],
)
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_norm_of_transformers_is_recognized(family: str, name: str, rule, place: str) -> None:
    module = of(family, name)(48, eps=1e-5).to(place)
    assert norms.is_candidate(module)
    assert norms.rule_of(module) == rule


def test_what_is_no_rms_norm_is_not_taken_for_one() -> None:
    bare = nn.LayerNorm(32, bias=False)
    assert norms.is_candidate(bare)
    assert norms.rule_of(bare) is None
    assert not norms.is_candidate(nn.LayerNorm(32))
    assert not norms.is_candidate(nn.Dropout(0.05))
    assert not norms.is_candidate(nn.Linear(4, 4))


def test_another_epsilon_is_another_norm() -> None:
    module = of("llama", "LlamaRMSNorm")(48, eps=1e-5)
    assert norms.agrees(module, norms.NormRule(1e-5))
    assert not norms.agrees(module, norms.NormRule(2e-5))


@pytest.mark.parametrize(
    ("activation", "rule"),
    [("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", None), ("quick_gelu", None)],
)
def test_the_activation_of_an_mlp_is_recognized(activation: str, rule: str | None) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, hidden_act=activation
    )
    module = of("llama", "LlamaMLP")(config)
    found = mlps.rule_of(module)
    assert (found.activation if found else None) == rule


def test_an_mlp_in_its_new_place_has_the_same_children_and_gives_the_same() -> None:
    config = transformers.Phi3Config(hidden_size=16, intermediate_size=24, pad_token_id=0)
    module = of("phi3", "Phi3MLP")(config)
    rule = mlps.rule_of(module)
    assert rule is not None
    taking = mlps.GatedMLP(dict(module.named_children()), rule)
    assert dict(taking.named_parameters()).keys() == dict(module.named_parameters()).keys()
    x = torch.randn(3, 16)
    torch.testing.assert_close(taking(x), module(x))


@pytest.mark.parametrize(
    ("family", "name", "kind"),
    [
        ("llama", "LlamaAttention", "halves"),
        ("phi3", "Phi3Attention", "halves"),
        ("gpt_oss", "GptOssAttention", "halves, a number for each pair"),
        ("cohere", "CohereAttention", "neighbours"),
        ("glm4", "Glm4Attention", "neighbours, half of the tables"),
    ],
)
def test_how_heads_are_turned_is_recognized(family: str, name: str, kind: str) -> None:
    module = object.__new__(of(family, name))
    assert rotary.is_candidate(module)
    assert rotary.kind_of(module) == kind


def test_trying_a_module_leaves_it_as_it_was() -> None:
    module = of("llama", "LlamaRMSNorm")(48).eval()
    mlp = of("llama", "LlamaMLP")(
        transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)
    ).eval()
    for one, rule_of in ((module, norms.rule_of), (mlp, mlps.rule_of)):
        before, weights = set(vars(one)), copy.deepcopy(one.state_dict())
        state = torch.get_rng_state()
        assert rule_of(one) is not None
        assert set(vars(one)) == before
        assert not any(part.training for part in one.modules())
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(one.state_dict(), weights, rtol=0, atol=0)


def test_names_are_sorted_by_rule_and_the_rest_is_counted() -> None:
    norm = of("llama", "LlamaRMSNorm")
    changed = norm(8)
    changed.register_forward_hook(lambda *_: None)
    network = nn.ModuleDict({"a": norm(8), "b": norm(8, eps=1e-5), "c": changed, "d": nn.LayerNorm(8, bias=False)})
    found, left = by_rule(network, norms.is_candidate, norms.rule_of)
    assert found == {norms.NormRule(1e-6): frozenset({"a"}), norms.NormRule(1e-5): frozenset({"b"})}
    assert left == {
        "LlamaRMSNorm, which has a forward or hooks of its own": 1,
        "LayerNorm, which computes something else": 1,
    }
