"""Building an optimizer through the section `optim`, and training a tiny Llama with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.merging import merge_groups
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model, Optimization
from torch import nn

PLUGIN = "bnb-optim"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(model: Model, **settings: Any) -> Optimization:
    section = {"schedule": "constant", **settings}
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["optim", PLUGIN], "optim": section})
    ctx.total_steps = 8
    groups = merge_groups(model, ctx.each(hooks.configure_groups, ctx, model))
    return ctx.call(hooks.build_optimizer, ctx, model, groups)


def train(model: Model, optimizer: Any, steps: range) -> None:
    for step in steps:
        batch = tiny_batches(seed=step)[0].to(next(model.module.parameters()).device)
        logps = model.compute(model.module, batch, frozenset({"logps"})).logps_N
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def tiny_on(device: str, seed: int = 0) -> Model:
    model = tiny_model(seed=seed)
    model.module.to(device)
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.fixture
def built() -> Callable[..., Optimization]:
    """`built(model, name="lion")`: the optimizer and schedule that a config names."""
    return build


@pytest.fixture
def equals() -> Callable[..., None]:
    """`equals(settings, direct, device)`: three steps give the same bits as `direct(parameters)` used by hand."""

    def check(settings: dict[str, Any], direct: Callable[[list[nn.Parameter]], Any], device: str = "cpu") -> None:
        ours, theirs, start = tiny_on(device), tiny_on(device), tiny_on(device)
        train(ours, build(ours, decay_all=True, **settings).optimizer, range(3))
        train(theirs, direct(list(theirs.module.parameters())), range(3))
        assert same_weights(ours.module, theirs.module)
        assert not same_weights(ours.module, start.module)

    return check


@pytest.fixture
def resumes(tmp_path: Path) -> Callable[..., None]:
    """`resumes(settings, device)`: four steps, a checkpoint read safely, four more: the bits of eight steps."""

    def check(settings: dict[str, Any], device: str = "cpu") -> None:
        whole, first, second = tiny_on(device), tiny_on(device), tiny_on(device, seed=5)
        train(whole, build(whole, **settings).optimizer, range(8))
        made = build(first, **settings)
        train(first, made.optimizer, range(4))
        torch.save([first.module.state_dict(), made.optimizer.state_dict()], tmp_path / "state.pt")
        weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
        made = build(second, **settings)
        second.module.load_state_dict(weights)
        made.optimizer.load_state_dict(state)
        train(second, made.optimizer, range(4, 8))
        assert same_weights(whole.module, second.module)

    return check
