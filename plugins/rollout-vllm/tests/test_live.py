"""The trainer's tensors under the names of a checkpoint: those that an export writes, without the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pegbox.errors import RunError
from pegbox.testing.tiny import tiny_model
from pegbox_rollout_vllm.cargo import Live
from pegbox_rollout_vllm.live import LiveWeights
from safetensors.torch import load_file

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def network(kind: str) -> torch.nn.Module:
    """A small model with random weights."""
    import transformers

    extra = {
        "Llama": {"tie_word_embeddings": True},
        "Qwen3Moe": {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
        "Mixtral": {"num_local_experts": 4},
        "GptOss": {"num_local_experts": 4, "layer_types": ["sliding_attention", "full_attention"]},
        "DeepseekV3": {
            "moe_intermediate_size": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 2,
        },
    }[kind]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **extra})
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3Moe", "Mixtral", "GptOss", "DeepseekV3"])
def test_names_and_tensors_are_those_of_the_exported_checkpoint(kind: str, tmp_path: Path) -> None:
    module = network(kind)
    module.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    live = LiveWeights(module)
    assert set(live) == set(expected)
    assert len(live) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(live[name], tensor), name
    sent = {name: (tensor, dtype) for name, tensor, dtype in live.entries(torch.bfloat16)}
    assert set(sent) == set(expected)
    assert all(torch.equal(sent[name][0], tensor) for name, tensor in expected.items())


def test_tensors_that_are_split_on_the_way_are_those_of_now() -> None:
    module = network("Qwen3Moe")
    live = LiveWeights(module)
    name = next(each for each in live if ".experts.1.up_proj" in each)
    before = live[name].clone()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    assert torch.equal(live[name], 2 * before)


def test_parameters_go_in_the_servers_data_type_and_buffers_in_their_own() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("correction", torch.zeros(2))
    found = {name: dtype for name, _, dtype in LiveWeights(module).entries(torch.bfloat16)}
    assert found == {"weight": torch.bfloat16, "bias": torch.bfloat16, "correction": torch.float32}


def test_what_was_trained_since_is_seen_and_refused_under_the_old_name() -> None:
    module = tiny_model().module
    weights = LiveWeights(module)
    cargo = Live(weights, [0.1, 0.2])
    assert cargo.weights is weights
    assert cargo.seal("v3") == Live(weights, [0.1, 0.2]).seal("v3") != Live(weights, [0.1, 0.3]).seal("v3")
    with torch.no_grad():
        next(module.parameters()).add_(0.0)
    with pytest.raises(RunError, match="has lost its weights, and the trainer holds newer ones by now"):
        _ = cargo.weights
    assert Live(weights, [0.1]).weights is weights
