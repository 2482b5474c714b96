"""The library's optimizers through a config, against the library used directly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer as library
import torch
from pegbox.errors import ConfigError, UserError
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model
from pegbox_pytorch_optimizer.optimizers import OPTIMIZERS
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

DIRECT: dict[str, Callable[..., Any]] = {
    "adopt": lambda m: library.ADOPT(m.parameters(), lr=0.01, weight_decay=0.1, weight_decouple=True),
    "came": lambda m: library.CAME(m.parameters(), lr=0.01, weight_decay=0.1),
    "lion": lambda m: library.Lion(m.parameters(), lr=0.01, weight_decay=0.1),
    "ademamix": lambda m: library.AdEMAMix(m.parameters(), lr=0.01, weight_decay=0.1, weight_decouple=True),
    "stable_adamw": lambda m: library.StableAdamW(m.parameters(), lr=0.01, weight_decay=0.1, kahan_sum=False),
    "adan": lambda m: library.Adan(m.parameters(), lr=0.01, weight_decay=0.1, weight_decouple=True),
    "grokfast_adamw": lambda m: library.GrokFastAdamW(m.parameters(), lr=0.01, weight_decay=0.1, normalize_lr=False),
    "prodigy": lambda m: library.Prodigy(m.parameters(), lr=0.01, weight_decay=0.1, d0=0.01),
    "soap": lambda m: library.SOAP(m.parameters(), lr=0.01, weight_decay=0.1, precondition_frequency=2),
    "flash_adamw": lambda m: library.FlashAdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "galore": lambda m: library.GaLore(
        [{"params": hidden(m), "rank": 8, "update_proj_gap": 3, "scale": 0.5, "projection_type": "std"}, others(m)],
        lr=0.01,
        weight_decay=0.1,
    ),
    "adamc": lambda m: library.AdamC([{"params": hidden(m), "normalized": True}, others(m)], lr=0.01, weight_decay=0.1),
    "normuon": lambda m: library.NorMuon(
        [
            {"params": hidden(m), "use_muon": True},
            {**others(m), "use_muon": False, "lr": 0.005, "eps": 1e-8, "weight_decay": 0.1},
        ],
        lr=0.01,
        weight_decay=0.1,
        update_scale="match_rms",
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "prodigy": {"d0": 0.01},
    "soap": {"precondition_frequency": 2},
    "galore": {"rank": 8, "update_proj_gap": 3, "scale": 0.5},
    "normuon": {"adamw_scale": 0.5},
}


def settings(name: str) -> dict[str, Any]:
    return {"name": name, "learning_rate": 0.01, "weight_decay": 0.1, "options": OPTIONS.get(name, {})}


def is_hidden(name: str) -> bool:
    return name.endswith("_proj.weight")


def hidden(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in module.named_parameters() if is_hidden(name)]


def others(module: nn.Module) -> dict[str, Any]:
    return {"params": [parameter for name, parameter in module.named_parameters() if not is_hidden(name)]}


def test_every_optimizer_is_tested() -> None:
    assert DIRECT.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", DIRECT)
def test_training_equals_the_library_used_directly(name: str, equals: Callable[..., None]) -> None:
    equals(settings(name), DIRECT[name])


@pytest.mark.parametrize("name", DIRECT)
def test_eight_steps_with_a_checkpoint_are_eight_steps_to_the_bit(name: str, resumes: Callable[..., None]) -> None:
    resumes(settings(name))


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
            built(sharded, **settings(name))
        return
    whole = tiny_model()
    for model in (whole, sharded):
        optimizer = built(model, **settings(name)).optimizer
        (-model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N.mean()).backward()
        optimizer.step()
    for one, other in zip(whole.module.parameters(), sharded.module.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())


@pytest.mark.parametrize("projection_type", ["reverse_std", "right", "left", "full"])
def test_every_projection_of_galore_resumes_to_the_bit(projection_type: str, resumes: Callable[..., None]) -> None:
    options = {**OPTIONS["galore"], "projection_type": projection_type}
    resumes({**settings("galore"), "options": options})


def test_only_hidden_matrices_are_projected_and_their_state_is_smaller(built: Callable[..., Any]) -> None:
    model = tiny_model()
    optimizer = built(model, **settings("galore")).optimizer
    train(model, optimizer)
    for name, parameter in model.module.named_parameters():
        average = optimizer.state[parameter]["exp_avg"]
        assert average.shape == parameter.shape or (is_hidden(name) and min(average.shape) == 8), name
        assert (average.shape == parameter.shape) != is_hidden(name), name


def test_adamc_decays_each_group_by_its_own_peak(built: Callable[..., Any]) -> None:
    groups = [{"pattern": "q_proj", "scale": 0.5}]
    model, start = tiny_model(), tiny_model()
    optimizer = built(model, **{**settings("adamc"), "groups": groups}).optimizer
    for group in optimizer.param_groups:
        group["lr"] *= 0.5
    for parameter in model.module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    before = dict(start.module.named_parameters())
    for name, parameter in model.module.named_parameters():
        peak = 0.005 if "q_proj" in name else 0.01
        decay = 0.0 if parameter.ndim == 1 else 0.1 * peak * (0.25 if is_hidden(name) else 0.5)
        torch.testing.assert_close(parameter, before[name] * (1 - decay), rtol=1e-7, atol=0, msg=name)


def test_the_correction_of_flash_adamw_resumes_with_16_bit_parameters(built: Callable[..., Any]) -> None:
    made = {**settings("flash_adamw"), "options": {"master_weight_bits": 24}}
    whole, first, second = (half(tiny_model()) for _ in range(3))
    optimizer = built(whole, **made).optimizer
    train(whole, optimizer, 4)
    before = built(first, **made).optimizer
    train(first, before, 2)
    second.module.load_state_dict(first.module.state_dict())
    after = built(second, **made).optimizer
    after.load_state_dict(before.state_dict())
    train(second, after, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole.module.parameters(), second.module.parameters(), strict=True))


def half(model: Model) -> Model:
    model.module.to(torch.bfloat16)
    return model


def train(model: Model, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        (-model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "galore"}, "no hidden matrix larger than rank 128"),
        ({"name": "adamc"}, "no hidden matrix that tiny trains is decayed"),
        ({"name": "prodigy", "embedding_scale": 0.5}, "parameters get 2 learning rates"),
        ({"name": "flash_adamw", "options": {"master_weight_bits": 24}}, "no trained parameter has 16 bits"),
        ({"name": "galore", "options": {"projection_type": "random"}}, "projection_type"),
        ({"name": "soap", "options": {"precondition_frequency": 0}}, "precondition_frequency"),
    ],
)
def test_options_that_do_nothing_or_are_out_of_range_are_refused(
    changes: dict[str, Any], says: str, built: Callable[..., Any]
) -> None:
    with pytest.raises((ConfigError, UserError), match=says):
        built(tiny_model(), **changes)


def test_normuon_without_a_hidden_matrix_is_refused(built: Callable[..., Any]) -> None:
    model = tiny_model()
    model.module.model.layers.requires_grad_(False)
    with pytest.raises(UserError, match="no hidden matrix"):
        built(model, name="normuon")
