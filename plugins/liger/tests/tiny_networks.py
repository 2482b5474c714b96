"""Tiny networks of several families with random weights, the same each time."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2}}


def network_of(family: str) -> torch.nn.Module:
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {})})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.train()


def outcome_of(network: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss on some tokens, and every gradient."""
    device = next(network.parameters()).device
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    network.zero_grad()
    loss = network(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
