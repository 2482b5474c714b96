"""The engine beside a training: it disturbs nothing, proves its weights, and shares work between processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError, RunError
from pegbox.plan import compose
from pegbox.rollouts import WeightUpdate
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import plain_model, tiny_model
from pegbox.types import Model
from rollout_policy import PROMPTS, completions, engine, request


def update(model: Model, version: int, **changes: Any) -> WeightUpdate:
    tensors = ((name, parameter.detach().clone()) for name, parameter in model.module.named_parameters())
    return WeightUpdate(**{"version": version, "kind": "full", "tensors": tensors, **changes})


def test_modes_and_random_generators_are_as_before(model: Model) -> None:
    model.module.train()
    model.module.model.layers[0].eval()
    modes = [part.training for part in model.module.modules()]
    state = torch.get_rng_state()
    made = engine(model)
    first = made.generate(request(samples=2), seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert [part.training for part in model.module.modules()] == modes
    torch.manual_seed(99)
    assert completions(made.generate(request(samples=2), seed=1)) == completions(first)


def test_gradient_checkpointing_and_dropout_do_not_change_completions(model: Model) -> None:
    expected = completions(engine(model).generate(request(temperature=0.0), seed=0))
    model.module.config.attention_dropout = 0.5
    for layer in model.module.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.module.train()
    model.module.gradient_checkpointing_enable()
    assert completions(engine(model).generate(request(temperature=0.0), seed=0)) == expected
    assert model.module.is_gradient_checkpointing
    assert model.module.training


def test_rollouts_carry_columns_prompts_and_the_version_last_announced(model: Model) -> None:
    made = engine(model)
    assert made.generate(request(), seed=0).rollouts[0].first_version == 0
    receipt = made.sync(update(model, 7))
    assert (receipt.engine, receipt.version) == ("rollout-hf", 7)
    batch = made.generate(request(samples=2), seed=0)
    assert [rollout.prompt for rollout in batch.rollouts] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [rollout.columns["row"] for rollout in batch.rollouts] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {(rollout.first_version, rollout.last_version) for rollout in batch.rollouts} == {(7, 7)}


def test_a_receipt_is_read_back_from_the_module(model: Model) -> None:
    made = engine(model)
    first = made.sync(update(model, 1)).evidence
    assert made.sync(update(model, 2)).evidence == first
    with torch.no_grad():
        model.module.lm_head.weight.add_(0.5)
    assert made.sync(update(model, 3)).evidence != first
    wrong = [(name, tensor + 1e-3) for name, tensor in update(model, 4).tensors]
    with pytest.raises(RunError, match="does not hold version 4"):
        made.sync(update(model, 4, tensors=wrong))
    with pytest.raises(RunError, match="none of its 1 tensors"):
        made.sync(update(model, 4, tensors=[("elsewhere.weight", torch.zeros(2))]))
    assert "digest" in made.sync(update(model, 5, tensors=())).evidence


def test_names_of_an_adapter_update_may_be_pefts(model: Model) -> None:
    tensors = [(f"base_model.model.{name}", tensor) for name, tensor in update(model, 1).tensors]
    assert f"{len(tensors)} of its parameters" in engine(model).sync(update(model, 1, tensors=tensors)).evidence


def test_weights_that_were_changed_without_an_update_are_not_sampled_with(model: Model) -> None:
    made = engine(model)
    made.sync(update(model, 1))
    made.generate(request(), seed=0)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=0.1)
    model.module(torch.tensor([PROMPTS[0]])).logits.sum().backward()
    optimizer.step()
    with pytest.raises(RunError, match="after version 1"):
        made.generate(request(), seed=0)
    made.sync(update(model, 2))
    made.generate(request(), seed=0)


class Rank(FakeRuntime):
    """One of two processes; what the other would have said is given."""

    world_size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.said: list[Any] = []
        self.others: list[Any] = []

    def gather_objects(self, value: object) -> list[object]:
        self.said.append(value)
        return sorted([value, *self.others], key=lambda said: said[1][0].prompt if said[1] else 9)


def test_processes_share_a_request_and_all_get_what_one_would_make(model: Model) -> None:
    wished = request(samples=2, temperature=1.0)
    alone = engine(model).generate(wished, seed=6)
    ranks = [Rank(0), Rank(1)]
    for rank in ranks:
        engine(model, rank).generate(wished, seed=6)
    assert sorted(one.prompt for rank in ranks for one in rank.said[0][1]) == [0, 0, 1, 1, 2, 2, 3, 3]
    ranks[0].others = [ranks[1].said[0]]
    together = engine(model, ranks[0]).generate(wished, seed=6)
    assert completions(together) == completions(alone)
    with pytest.raises(RunError, match="different rollouts"):
        engine(model, ranks[0]).generate(wished, seed=7)


def test_a_policy_that_cannot_generate_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot generate"):
        engine(plain_model())


def test_a_sharded_policy_is_refused(model: Model) -> None:
    from torch import distributed as dist
    from torch.distributed.tensor import distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = distribute_tensor(model.module.lm_head.weight.detach(), mesh)
        model.module.lm_head.weight = torch.nn.Parameter(sharded)
        with pytest.raises(ConfigError, match="sharded"):
            engine(model)
    finally:
        dist.destroy_process_group()


def test_an_empty_prompt_is_named(model: Model) -> None:
    with pytest.raises(RunError, match="prompt 1 of a request"):
        engine(model).generate(request(prompts=[(1,), ()]), seed=0)


def test_continuous_batching_without_a_gpu_is_refused(model: Model) -> None:
    with pytest.raises(ConfigError, match="device 'cpu'"):
        engine(model, continuous="on")


def test_the_plugin_asks_for_a_started_run_and_its_unseeded_sampling_goes_on_after_a_resume() -> None:
    from types import SimpleNamespace

    from pegbox import hooks
    from pegbox.events import RunStarted
    from pegbox.testing.tiny import tiny_processor

    def started() -> Any:
        ctx = compose({"model": {"name": "tiny"}, "plugins": ["rollout-hf"]})
        with pytest.raises(RunError, match="before the run has started"):
            ctx.call(hooks.generate_rollouts, ctx, request())
        ctx.runtime, ctx.processor = FakeRuntime(), tiny_processor()
        model: Any = tiny_model()
        ctx.notify(RunStarted(job=SimpleNamespace(model=model), step=0))  # type: ignore[arg-type]
        return ctx

    first = started()
    made = [completions(first.call(hooks.generate_rollouts, first, request())) for _ in range(3)]
    assert made[0] != made[1] != made[2]
    resumed = started()
    resumed.call(hooks.generate_rollouts, resumed, request(seed=3))
    state = {"requests": 2}
    resumed.states["rollout-hf/plugin"].load_state_dict(state)
    assert completions(resumed.call(hooks.generate_rollouts, resumed, request())) == made[2]
    assert resumed.states["rollout-hf/plugin"].state_dict() == {"requests": 3}
