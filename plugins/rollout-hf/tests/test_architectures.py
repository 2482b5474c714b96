"""Networks of other kinds: windows, sinks, learnt positions, experts, linear attention; with padding and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from pegbox.testing.tiny import BOS, EOS, PAD, VOCABULARY
from pegbox.types import Model
from rollout_policy import PROMPTS, engine, request

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8}
LINEAR = {
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
}
KINDS: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 8},
    "GptOss": {"sliding_window": 8, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": EXPERTS,
    "Qwen3Next": {**EXPERTS, **LINEAR},
}


def network(kind: str) -> Any:
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **KINDS[kind]})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = getattr(transformers, f"{kind}ForCausalLM")(config).float()
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_completions_are_those_of_transformers_prompt_by_prompt(kind: str) -> None:
    module = network(kind)
    compute: Any = None
    model = Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute)
    batch = engine(model).generate(request(samples=2, temperature=0.0), seed=0)
    module.eval()
    for place, rollout in enumerate(batch.rollouts):
        ids = torch.tensor([PROMPTS[place // 2]])
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD}
        expected = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert rollout.completion == tuple(expected[0, ids.shape[1] :].tolist())
