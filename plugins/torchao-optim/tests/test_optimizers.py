"""torchao's optimizers through a config, against torchao used directly. Each shape of parameter compiles a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torchao.optim
from pegbox.errors import ConfigError
from pegbox.testing.tiny import tiny_model
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit

SETTINGS = {"learning_rate": 0.01, "weight_decay": 0.1}
CLASSES = {"adamw_torchao_8bit": "AdamW8bit", "adamw_torchao_4bit": "AdamW4bit"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_training_equals_torchao_used_directly(name: str, equals: Callable[..., None]) -> None:
    kind = getattr(torchao.optim, CLASSES[name])
    equals({"name": name, **SETTINGS}, lambda parameters: kind(parameters, lr=0.01, weight_decay=0.1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSES)
def test_eight_steps_with_a_checkpoint_are_eight_steps_to_the_bit(name: str, resumes: Callable[..., None]) -> None:
    resumes({"name": name, **SETTINGS})


@pytest.mark.parametrize(
    ("name", "state"), [("adamw_torchao_8bit", OptimState8bit), ("adamw_torchao_4bit", OptimState4bit)]
)
def test_state_of_large_matrices_is_low_bit(name: str, state: type, built: Callable[..., Any]) -> None:
    model = tiny_model()
    optimizer = built(model, name=name).optimizer
    assert isinstance(optimizer._new_buffer(model.module.lm_head.weight, signed=True), state)


def test_fp8_state_needs_a_gpu_that_has_fp8(built: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="adamw_torchao_8bit"):
        built(tiny_model(), name="adamw_torchao_fp8")


def test_unknown_options_are_refused(built: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="unknown key 'amsgrad'"):
        built(tiny_model(), name="adamw_torchao_8bit", options={"amsgrad": True})
