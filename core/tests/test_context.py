"""The context of a run: states, randomness, phases, second models, and what is read too early."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Generator
from typing import Any

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import PegboxError
from pegbox.hooks import hookimpl
from pegbox.types import Item, Model, ModelRequest, ModulePatch


class Counter:
    """Something with state, equal to others of its kind."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Counter)

    __hash__ = object.__hash__

    def __init__(self, split: str = "train") -> None:
        self.count, self.split = 0, split

    def state_dict(self) -> dict[str, object]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.count = int(str(state_dict["count"]))


# ---- states ----


class Keeper(Counter):
    """A plugin that keeps state itself, and answers with things that do."""

    @hookimpl
    def build_dataset(self, split: str) -> Counter:
        return Counter(split)

    @hookimpl
    def build_batches(self, dataset: object) -> Counter:
        return Counter()

    @hookimpl
    def build_loss(self) -> Counter:
        return Counter()

    @hookimpl
    def build_runtime(self) -> object:
        return object()


def test_a_plugin_instance_with_state_is_registered_when_the_run_is_composed(composed) -> None:
    keeper = Keeper()
    ctx = composed({"plain": object(), "keeper": keeper})
    assert ctx.states == {"keeper/plugin": keeper}


def test_answers_with_state_are_registered_under_plugin_and_hook(composed) -> None:
    ctx = composed({"keeper": Keeper()})
    loss = ctx.call(hooks.build_loss, ctx, None)
    train = ctx.call(hooks.build_dataset, ctx, None, "train")
    batches = ctx.call(hooks.build_batches, ctx, None, train)
    ctx.call(hooks.build_runtime, ctx)
    assert list(ctx.states) == ["keeper/plugin", "keeper/loss", "keeper/dataset", "keeper/batches"]
    assert ctx.states["keeper/loss"] is loss
    assert ctx.states["keeper/dataset"] is train
    assert ctx.states["keeper/batches"] is batches


def test_evaluation_keeps_no_state(composed) -> None:
    ctx = composed({"keeper": Keeper()})
    held_out = ctx.call(hooks.build_dataset, ctx, None, split="eval")
    ctx.call(hooks.build_batches, ctx, None, held_out)
    assert list(ctx.states) == ["keeper/plugin"]


def test_what_a_wrapper_makes_of_an_answer_is_what_is_registered(composed) -> None:
    class Refiner:
        @hookimpl(wrapper=True)
        def build_loss(self) -> Generator[None, object, object]:
            yield
            return refined

    refined = Counter()
    ctx = composed({"keeper": Keeper(), "refiner": Refiner()})
    assert ctx.call(hooks.build_loss, ctx, None) is refined
    assert ctx.states["keeper/loss"] is refined


def test_two_states_of_one_name_are_refused_and_the_same_one_twice_is_not(composed) -> None:
    ctx, state = composed({"keeper": Keeper()}), Counter()
    ctx.register_state("keeper/sampler", state)
    ctx.register_state("keeper/sampler", state)
    with pytest.raises(PegboxError, match="two states are registered as 'keeper/sampler'"):
        ctx.register_state("keeper/sampler", Counter())
    ctx.call(hooks.build_loss, ctx, None)
    with pytest.raises(PegboxError, match="'keeper/loss'"):
        ctx.call(hooks.build_loss, ctx, None)


# ---- randomness ----


def test_randomness_depends_on_seed_name_and_step_and_on_nothing_else(composed) -> None:
    alone, crowded = composed({}), composed({"keeper": Keeper(), "other": object()})
    seeds = {
        (seed, name, step): composed({}, f"seed={seed}").rng(name, step).seed
        for seed in (0, 1)
        for name in ("packing", "packing1", "shuffle")
        for step in (0, 1, 10)
    }
    assert len(set(seeds.values())) == len(seeds)
    crowded.rng("other").python().random()
    assert crowded.rng("packing", 1).seed == alone.rng("packing", 1).seed == seeds[0, "packing", 1]
    draws = [ctx.rng("packing").python().sample(range(100), 5) for ctx in (alone, alone, crowded)]
    assert draws[0] == draws[1] == draws[2]


def test_randomness_is_the_same_in_another_process(composed) -> None:
    code = "from pegbox.plan import compose; print(compose({'model': {'name': 'm'}, 'seed': 5}).rng('packing', 3).seed)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == composed({}, seed=5).rng("packing", 3).seed


def test_a_seed_fits_generators_that_take_63_bits(composed) -> None:
    ctx = composed({})
    assert all(0 <= ctx.rng("name", step).seed < 2**63 for step in range(200))


# ---- what is set during a run ----


@pytest.mark.parametrize(
    ("name", "hook"), [("runtime", "build_runtime"), ("processor", "load_processor"), ("total_steps", "build_batches")]
)
def test_reading_what_is_not_set_yet_names_the_hook_that_sets_it(composed, name: str, hook: str) -> None:
    ctx = composed({})
    with pytest.raises(PegboxError, match=rf"ctx\.{name} was read before it was set") as error:
        getattr(ctx, name)
    assert hook in str(error.value)
    setattr(ctx, name, 3)
    assert getattr(ctx, name) == 3


def test_an_attribute_that_does_not_exist_is_a_plain_attribute_error(composed) -> None:
    with pytest.raises(AttributeError, match="modle"):
        composed({}).modle  # noqa: B018


def test_a_context_can_be_shown_before_the_run(composed) -> None:
    assert "Context(" in repr(composed({}))


def test_what_is_registered_for_the_end_is_closed_in_reverse(composed) -> None:
    ctx, closed = composed({}), []
    ctx.exit.callback(closed.append, "first opened")
    ctx.exit.callback(closed.append, "last opened")
    with pytest.raises(ValueError, match="stop"), ctx.exit:
        raise ValueError("stop")
    assert closed == ["last opened", "first opened"]


def test_observers_of_phases_are_told_in_order(composed) -> None:
    ctx, told = composed({}), []
    ctx.phase_observers.append(lambda phase: told.append(("engine", phase)))
    ctx.phase_observers.append(lambda phase: told.append(("other", phase)))
    with ctx.phase("generate"):
        assert told == [("engine", "generate"), ("other", "generate")]
    with ctx.phase("learn"):
        pass
    assert told[2:] == [("engine", "learn"), ("other", "learn")]


def test_two_runs_share_nothing(composed) -> None:
    one, two = composed({}), composed({})
    one.register_state("a/b", Counter())
    one.phase_observers.append(print)
    assert (two.states, two.phase_observers, two.kernel.patches.applied) == ({}, [], [])


# ---- second models ----


class Models:
    """Loads, patches, adapts and places a tiny model, and writes down in which role."""

    def __init__(self) -> None:
        self.story: list[str] = []

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="model_format", name="tiny", target=self)]

    @hookimpl
    def load_model(self, request: ModelRequest) -> Model:
        import torch

        self.story.append(f"load {request.role} {request.name}")
        compute: Any = None
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout())
        return Model(
            module=module, name=request.name, base=request.name, format="tiny", compute=compute, role=request.role
        )

    @hookimpl
    def patch_modules(self, model: Model, stage: str) -> list[ModulePatch]:
        self.story.append(f"{stage} {model.role}")
        keep = ModulePatch(slot="mlp", target="0", replace=lambda old: lambda x: x, reason="a test")
        return [keep] if stage == "base" else []

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        self.story.append(f"adapt {model.role}")
        return model

    @hookimpl
    def place_model(self, model: Model) -> Model:
        self.story.append(f"place {model.role}")
        return dataclasses.replace(model, forward=lambda batch, needs: None)


def test_a_second_model_is_loaded_patched_and_placed_without_adapters_and_frozen(composed) -> None:
    pytest.importorskip("torch")
    models = Models()
    ctx: Context = composed({"models": models})
    opened = ctx.open_model("reference", ModelRequest(name="base", format="tiny"))
    assert models.story == [
        "load reference base",
        "base reference",
        "adapted reference",
        "recompute reference",
        "compile reference",
        "place reference",
    ]
    assert opened.role == "reference"
    assert opened.forward is not None
    assert not opened.module.training
    assert not any(parameter.requires_grad for parameter in opened.module.parameters())
    assert [applied.module_name for applied in ctx.kernel.patches.applied] == ["0"]


def test_the_policy_is_adapted_between_the_stages_base_and_adapted(composed) -> None:
    pytest.importorskip("torch")
    from pegbox.assembly import prepare_model

    models = Models()
    ctx = composed({"models": models})
    policy = prepare_model(ctx, ModelRequest(name="base", format="tiny"))
    assert [step for step in models.story if step.split()[0] in ("base", "adapt", "adapted", "place")] == [
        "base policy",
        "adapt policy",
        "adapted policy",
        "place policy",
    ]
    assert policy.module.training
    ctx.open_model("reference", ModelRequest(name="base", format="tiny"))
    assert len(ctx.kernel.patches.applied) == 2
