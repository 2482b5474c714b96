"""The library's optimizers through a config, against the library used directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer as library
import torch
from pegbox.errors import ConfigError
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model
from pegbox_pytorch_optimizer.optimizers import OPTIMIZERS
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

DIRECT: dict[str, Callable[..., Any]] = {
    "adopt": lambda p: library.ADOPT(p, lr=0.01, weight_decay=0.1, weight_decouple=True),
    "came": lambda p: library.CAME(p, lr=0.01, weight_decay=0.1),
    "lion": lambda p: library.Lion(p, lr=0.01, weight_decay=0.1),
    "ademamix": lambda p: library.AdEMAMix(p, lr=0.01, weight_decay=0.1, weight_decouple=True),
    "stable_adamw": lambda p: library.StableAdamW(p, lr=0.01, weight_decay=0.1, kahan_sum=False),
    "adan": lambda p: library.Adan(p, lr=0.01, weight_decay=0.1, weight_decouple=True),
    "grokfast_adamw": lambda p: library.GrokFastAdamW(p, lr=0.01, weight_decay=0.1, normalize_lr=False),
}


def test_every_optimizer_is_tested() -> None:
    assert DIRECT.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", DIRECT)
def test_training_equals_the_library_used_directly(name: str, equals: Callable[..., None]) -> None:
    equals({"name": name, "learning_rate": 0.01, "weight_decay": 0.1}, DIRECT[name])


@pytest.mark.parametrize("name", DIRECT)
def test_eight_steps_with_a_checkpoint_are_eight_steps_to_the_bit(name: str, resumes: Callable[..., None]) -> None:
    resumes({"name": name, "learning_rate": 0.01, "weight_decay": 0.1})


def test_unknown_options_are_refused_with_a_hint(built: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'betas'"):
        built(tiny_model(), name="lion", options={"beta": [0.9, 0.9]})


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Model]:
    """A tiny model whose parameters are sharded, over one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    model = tiny_model()
    fully_shard(model.module, mesh=init_device_mesh("cpu", (1,)))
    yield model
    dist.destroy_process_group()


@pytest.mark.parametrize("name", DIRECT)
def test_sharded_parameters_are_stepped_as_whole_ones_or_refused(
    name: str, sharded: Model, built: Callable[..., Any]
) -> None:
    if not OPTIMIZERS[name].steps_sharded:
        with pytest.raises(ConfigError, match="place the model unsharded"):
            built(sharded, name=name)
        return
    whole = tiny_model()
    for model in (whole, sharded):
        optimizer = built(model, name=name).optimizer
        (-model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N.mean()).backward()
        optimizer.step()
    for one, other in zip(whole.module.parameters(), sharded.module.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())
