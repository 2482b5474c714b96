"""bitsandbytes' optimizers through a config, against bitsandbytes used directly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes import optim
from pegbox.errors import ConfigError
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox_bnb_optim.optimizers import OPTIMIZERS

SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.1, "options": {"embeddings_in_32_bits": False}}
DIRECT: dict[str, Any] = {
    "adamw_8bit": optim.AdamW8bit,
    "lion_8bit": optim.Lion8bit,
    "ademamix_8bit": optim.AdEMAMix8bit,
}


@pytest.mark.parametrize("name", DIRECT)
def test_training_equals_bitsandbytes_used_directly(name: str, equals: Callable[..., None]) -> None:
    equals({"name": name, **SETTINGS}, lambda parameters: DIRECT[name](parameters, lr=0.01, weight_decay=0.1))


@pytest.mark.parametrize("name", DIRECT)
def test_eight_steps_with_a_checkpoint_are_eight_steps_to_the_bit(name: str, resumes: Callable[..., None]) -> None:
    resumes({"name": name, "learning_rate": 0.01, "weight_decay": 0.1})


def test_large_matrices_have_8_bit_state_and_embeddings_and_small_ones_32(built: Callable[..., Any]) -> None:
    model = tiny_model()
    optimizer = built(model, name="adamw_8bit").optimizer
    model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N.sum().backward()
    optimizer.step()
    kinds = {name: optimizer.state[p]["state1"].dtype for name, p in model.module.named_parameters()}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert kinds["lm_head.weight"] == torch.uint8
    assert kinds["model.embed_tokens.weight"] == kinds["model.norm.weight"] == torch.float32


def test_one_optimizers_exceptions_do_not_reach_another(built: Callable[..., Any]) -> None:
    built(tiny_model(), name="adamw_8bit")
    assert optim.GlobalOptimManager.get_instance().pid2config == {}


@pytest.mark.parametrize("name", [name for name, recipe in OPTIMIZERS.items() if recipe.paged])
def test_a_paged_optimizer_without_cuda_is_refused(name: str, built: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="Remove 'paged_'"):
        built(tiny_model(), name=name)


def test_unknown_options_are_refused(built: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="unknown key 'optim_bits'"):
        built(tiny_model(), name="adamw_8bit", options={"optim_bits": 8})
