"""What cannot be sharded is refused before weights are read, or before the first step, with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError, RunError
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import plain_model, tiny_model
from pegbox_fsdp.config import FsdpConfig
from pegbox_fsdp.layers import layers_of
from sharded_runs import config, run, save_base
from torch import nn


def asked(rank: int = 0, ranks: int = 4, precision: str = "fp32", **section: Any) -> Any:
    """What is asked of the model on one process of a run."""
    ctx = compose({"model": {"name": "none"}, "plugins": ["fsdp"], "fsdp": section})
    ctx.runtime = FakeRuntime()
    ctx.runtime.rank, ctx.runtime.world_size, ctx.runtime.precision = rank, ranks, precision  # type: ignore[attr-defined]
    return [answer for _, answer in ctx.each(hooks.configure_model, ctx)]


def test_every_process_but_the_first_gets_a_model_without_weights() -> None:
    assert asked(rank=0) == []
    assert [options.empty for options in asked(rank=3)] == [True]
    assert asked(rank=3, load="every") == []


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"replicas": 3}, "replicas is 3, but the run has 4 processes"),
        ({"reshard_after_forward": 4}, "reshard_after_forward is 4"),
        ({"reshard_after_forward": 2, "replicas": 2}, "sharded over 2 processes"),
        ({"offload": True}, "trains on the CPU"),
    ],
)
def test_settings_that_do_not_fit_the_processes_are_errors(section: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        asked(**section)


def test_fp16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"precision is fp16.*[\s\S]*bf16"):
        asked(precision="fp16")


def test_a_plan_that_places_the_model_otherwise_is_refused() -> None:
    ctx = compose({"model": {"name": "none"}, "plugins": ["trainer", "fsdp"], "use": {"place_model": "trainer"}})
    with pytest.raises(ConfigError, match="'trainer' places the model"):
        ctx.each(hooks.configure_model, ctx)


def test_layers_are_those_of_the_class_or_of_the_expression() -> None:
    model = tiny_model()
    assert list(layers_of(FsdpConfig(), model)) == ["model.layers.1", "model.layers.0"]
    both = layers_of(FsdpConfig(layers=r"model\.layers\.\d+(\.mlp)?"), model)
    assert list(both).index("model.layers.0.mlp") < list(both).index("model.layers.0"), "inner ones first"
    with pytest.raises(ConfigError, match="matches nothing"):
        layers_of(FsdpConfig(layers="blocks"), model)
    with pytest.raises(ConfigError, match="finds no layers"):
        layers_of(FsdpConfig(), plain_model())


def test_layers_that_share_a_weight_are_refused() -> None:
    model = tiny_model()
    layers = model.module.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ConfigError, match="share a weight"):
        layers_of(FsdpConfig(), model)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path / "base"


def test_a_model_that_is_compiled_as_one_is_refused(tmp_path: Path, base: Path) -> None:
    compiled = {"scope": "model", "backend": "eager"}
    with pytest.raises(ConfigError, match="model is compiled as one"):
        run(config(base, tmp_path / "run", "compile", compile=compiled))


def test_weights_of_several_data_types_are_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="several data types"):
        run(config(base, tmp_path / "run", "halves"), halves=Halves())


def test_a_quantized_model_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantized \(model.norm.weight"):
        run(config(base, tmp_path / "run", "halves", "lora"), halves=Halves(torch.int8))


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_of_another_placement_is_refused(tmp_path: Path, base: Path, first: bool) -> None:
    short = {"trainer": {"max_steps": 1}}
    run(config(base, tmp_path / "run", sharded=first, **short))
    longer = {"trainer": {"max_steps": 2}, "resume": "auto"}
    with pytest.raises(RunError, match=r"holds no shards|has no model\.safetensors"):
        run(config(base, tmp_path / "run", sharded=not first, **longer))


class Halves:
    """Gives the last norm another data type."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self._dtype = dtype

    @hooks.hookimpl
    def patch_modules(self, model: Any, stage: str) -> list[Any]:
        if stage == "base":
            norm = model.module.model.norm
            trained = self._dtype.is_floating_point
            norm.weight = nn.Parameter(norm.weight.detach().to(self._dtype), requires_grad=trained)
        return []


def test_a_run_of_one_process_shards_too(tmp_path: Path, base: Path) -> None:
    """Its group of one is left behind as it was found: there is none."""
    seen = run(config(base, tmp_path / "run", trainer={"max_steps": 1}))
    assert seen.facts["placement"] == "fsdp over 1 processes"
    assert not torch.distributed.is_initialized()
