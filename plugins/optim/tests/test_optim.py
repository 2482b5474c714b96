"""Each optimizer against torch used directly; each schedule against its formula; exact resume of all of them."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, PluginError, UserError
from pegbox.events import Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.merging import merge_groups
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model, Optimization
from pegbox_optim.schedules import SCHEDULES
from safetensors.torch import load_file
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")
NAMES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "sgd": {"momentum": 0.9, "nesterov": True},
    "adafactor": {},
    "rmsprop": {"alpha": 0.9, "momentum": 0.5, "centered": True},
    "adagrad": {"lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "muon": {"adamw_scale": 0.5},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def context(steps: int | None = 8, **settings: Any) -> Context:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["optim"], "optim": settings})
    ctx.total_steps = steps
    return ctx


def built(model: Model, steps: int | None = 8, **settings: Any) -> Optimization:
    ctx = context(steps, **settings)
    return ctx.call(
        hooks.build_optimizer, ctx, model, merge_groups(model, ctx.each(hooks.configure_groups, ctx, model))
    )


def train(model: Model, optimizer: Any, steps: range, schedule: Any = None) -> None:
    for step in steps:
        batch = tiny_batches(seed=step)[0]
        logps = model.compute(model.module, batch, frozenset({"logps"})).logps_N
        (-logps.mean()).backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        optimizer.zero_grad()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, left), right in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("name", [name for name in NAMES if name != "muon"])
def test_training_equals_torch_used_directly(name: str) -> None:
    ours, theirs = tiny_model(), tiny_model()
    made = built(
        ours, name=name, options=NAMES[name], learning_rate=0.01, weight_decay=0.1, decay_all=True, schedule="constant"
    )
    direct = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1, **NAMES[name]),
        "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1, **NAMES[name]),
    }[name](theirs.module.parameters())
    train(ours, made.optimizer, range(4), made.schedule)
    train(theirs, direct, range(4))
    assert_same_weights(ours.module, theirs.module)


def test_muon_steps_hidden_matrices_and_adamw_the_rest() -> None:
    ours, theirs = tiny_model(), tiny_model()
    made = built(ours, name="muon", options=NAMES["muon"], learning_rate=0.01, weight_decay=0.1, schedule="constant")
    named = dict(theirs.module.named_parameters())
    hidden = {n: p for n, p in named.items() if p.ndim == 2 and "embed" not in n and "head" not in n}
    norms = {n: p for n, p in named.items() if p.ndim == 1}
    rest = {n: p for n, p in named.items() if n not in hidden and n not in norms}
    assert {n for g in made.optimizer.param_groups if g["algorithm"] == "muon" for n in g["param_names"]} == set(hidden)
    muon = torch.optim.Muon(hidden.values(), lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": list(rest.values()), "weight_decay": 0.1}, {"params": list(norms.values()), "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.9, 0.95),
    )
    train(ours, made.optimizer, range(4))
    for step in range(4):
        train(theirs, _Both(muon, adamw), range(step, step + 1))
    assert_same_weights(ours.module, theirs.module)


class _Both:
    def __init__(self, *optimizers: Any) -> None:
        self._all = optimizers

    def step(self) -> None:
        for optimizer in self._all:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._all:
            optimizer.zero_grad()


@pytest.mark.parametrize("name", NAMES)
def test_four_steps_a_checkpoint_and_four_more_are_eight_steps_to_the_bit(name: str, tmp_path: Path) -> None:
    settings = {"name": name, "options": NAMES[name], "weight_decay": 0.1, "schedule": "rex", "warmup_steps": 2}
    whole = tiny_model()
    made = built(whole, **settings)
    train(whole, made.optimizer, range(8), made.schedule)

    first = tiny_model()
    made = built(first, **settings)
    train(first, made.optimizer, range(4), made.schedule)
    parts = (first.module, made.optimizer, made.schedule)
    torch.save([part.state_dict() for part in parts], tmp_path / "state.pt")
    floats = [v for s in made.optimizer.state.values() for v in s.values() if v.is_floating_point()]
    assert {value.dtype for value in floats} == {torch.float32}

    second = tiny_model(seed=5)
    made = built(second, **settings)
    parts = (second.module, made.optimizer, made.schedule)
    for part, state in zip(parts, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    train(second, made.optimizer, range(4, 8), made.schedule)
    assert_same_weights(whole.module, second.module)


def rates(schedule: str, total: int, **settings: Any) -> list[float]:
    made = built(tiny_model(), total, name="sgd", learning_rate=1.0, schedule=schedule, **settings)
    seen = []
    for _ in range(total):
        seen.append(made.schedule.get_last_lr()[0])
        made.optimizer.step()
        made.schedule.step()
    return seen


def test_rex_follows_its_formula_after_the_warmup() -> None:
    expected = [step / 4 if step < 4 else (z := 1 - (step - 4) / 16) / (0.5 + 0.5 * z) for step in range(20)]
    assert rates("rex", 20, warmup_steps=4) == pytest.approx(expected)
    assert min(rates("rex", 50, schedule_options={"min_ratio": 0.25})) >= 0.25


def test_cosine_then_constant_and_constant_then_cosine_are_where_they_say() -> None:
    options = {"min_ratio": 0.1, "constant_ratio": 0.2}
    down = rates("cosine_then_constant", 100, schedule_options=options)
    assert down[40] == pytest.approx(0.1 + 0.9 * 0.5)
    assert down[80:] == pytest.approx([0.1] * 20)
    late = rates("constant_then_cosine", 100, schedule_options=options)
    assert late[:21] == pytest.approx([1.0] * 21)
    assert late[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))


def test_one_cycle_equals_torchs() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    direct = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=20, cycle_momentum=False)
    expected = []
    for _ in range(20):
        expected.append(direct.get_last_lr()[0])
        optimizer.step()
        direct.step()
    assert rates("one_cycle", 20) == pytest.approx(expected)
    assert max(expected) == pytest.approx(1.0)


def test_warmup_stable_decay_is_flat_between_warmup_and_the_last_tenth() -> None:
    seen = rates("warmup_stable_decay", 100, warmup_ratio=0.05, schedule_options={"decay_type": "linear"})
    assert seen[5:91] == pytest.approx([1.0] * 86)
    assert seen[95] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_runs_and_its_state_is_plain(schedule: str, tmp_path: Path) -> None:
    options = {"min_lr_rate": 0.1} if "min_lr" in schedule else {}
    made = built(tiny_model(), 10, name="sgd", schedule=schedule, schedule_options=options)
    for _ in range(10):
        made.optimizer.step()
        made.schedule.step()
    torch.save([made.schedule.state_dict(), made.optimizer.state_dict()], tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


def test_groups_and_embeddings_get_their_own_rates_and_decay() -> None:
    made = built(
        tiny_model(),
        learning_rate=1.0,
        weight_decay=0.1,
        groups=[{"pattern": r"\.q_proj\.", "scale": 0.5}, {"pattern": "norm", "weight_decay": 0.2}],
        embedding_learning_rate=0.25,
        schedule="constant",
    )
    for group in made.optimizer.param_groups:
        for name in group["param_names"]:
            rate = 0.5 if "q_proj" in name else 0.25 if "embed_tokens" in name or "lm_head" in name else 1.0
            assert (group["lr"], group["weight_decay"]) == (rate, 0.2 if "norm" in name else 0.1), name


def test_a_group_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(PluginError, match="no_such_name"):
        built(tiny_model(), groups=[{"pattern": "no_such_name", "scale": 2.0}])


def test_a_rate_for_embeddings_that_are_frozen_is_an_error() -> None:
    model = tiny_model()
    model.module.get_input_embeddings().requires_grad_(False)
    model.module.get_output_embeddings().requires_grad_(False)
    with pytest.raises(UserError, match="trains no embedding"):
        built(model, embedding_scale=0.1)


def test_muon_without_a_hidden_matrix_is_an_error() -> None:
    model = tiny_model()
    model.module.model.layers.requires_grad_(False)
    with pytest.raises(UserError, match="no hidden matrix"):
        built(model, name="muon")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "adamv"}, "Did you mean 'adamw'"),
        ({"name": "adamw_8bit"}, "add the plugin that brings it"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"options": {"betta": 1}}, "unknown key 'betta'"),
        ({"name": "sgd", "options": {"betas": [0.9, 0.9]}}, "unknown key 'betas'"),
        ({"name": "sgd", "options": {"nesterov": True}}, "nesterov needs a momentum"),
        ({"options": {"eps": -1.0}}, "greater than 0"),
        ({"schedule": "cosine_with_min_lr"}, "floor is one of them"),
        ({"schedule": "constant", "warmup_steps": 3}, "takes no warm-up"),
        ({"schedule": "one_cycle", "warmup_ratio": 0.1}, "takes no warm-up"),
        ({"schedule": "warmup_stable_decay", "schedule_options": {"decay_steps": 1, "decay_ratio": 0.1}}, "remove one"),
    ],
)
def test_what_does_not_fit_is_refused_in_the_plan(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        context(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"warmup_steps": 1, "warmup_ratio": 0.1}, "remove one of them"),
        ({"embedding_scale": 1.0, "embedding_learning_rate": 0.1}, "remove one of them"),
        ({"groups": [{"pattern": "a"}]}, "sets nothing"),
        ({"groups": [{"pattern": "(", "scale": 1.0}]}, "no regular expression"),
        ({"groups": [{"pattern": "a", "scale": 1.0, "learning_rate": 1.0}]}, "remove one of them"),
    ],
)
def test_settings_that_clash_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        context(**settings)


@pytest.mark.parametrize(
    ("steps", "settings", "says"),
    [
        (None, {"schedule": "cosine"}, "open end"),
        (None, {"schedule": "constant_with_warmup", "warmup_ratio": 0.1}, "open end"),
        (10, {"warmup_steps": 11}, "but the run has 10 steps"),
    ],
)
def test_a_schedule_must_fit_the_length_of_the_run(steps: int | None, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        built(tiny_model(), steps, **settings)


def test_a_run_without_an_end_takes_an_endless_schedule() -> None:
    made = built(tiny_model(), None, schedule="constant_with_warmup", warmup_steps=2)
    assert made.schedule.get_last_lr()[0] == 0.0


class Break:
    """Breaks a run off after step 5."""

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 5:
            raise KeyboardInterrupt


def run(folder: Path, instance: object = None) -> None:
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "optim", "trainer", *(["break"] if instance else [])],
        "tiny_llama": {"rows": 24},
        "optim": {"name": "muon", "learning_rate": 0.01, "schedule": "rex", "warmup_ratio": 0.2, "weight_decay": 0.1},
        "trainer": {"progress": "none", "max_steps": 8, "save_every": 4, "device": "cpu"},
        "resume": "auto",
        "output": str(folder),
    }
    execute(compose(config, instances={"break": instance} if instance else None))


def test_a_run_with_muon_that_broke_off_ends_with_the_same_bits(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Break())
    run(tmp_path / "run")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[Model]:
    """A tiny model whose parameters are sharded, over one process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    model = tiny_model()
    fully_shard(model.module, mesh=init_device_mesh("cpu", (1,)))
    yield model
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_optimizers_of_whole_matrices_refuse_sharded_ones(name: str, sharded: Model) -> None:
    with pytest.raises(ConfigError, match="needs whole matrices"):
        built(sharded, name=name)


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop", "adagrad"])
def test_the_others_step_sharded_parameters_as_whole_ones(name: str, sharded: Model) -> None:
    whole = tiny_model()
    for model in (whole, sharded):
        train(model, built(model, name=name).optimizer, range(2))
    for one, other in zip(whole.module.parameters(), sharded.module.parameters(), strict=True):
        assert torch.equal(one, other.full_tensor())


def test_a_plan_sees_wrong_options_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: tiny}\nplugins: [optim]\noptim: {name: muon, schedule: rex}\n")
    program = f"""
import sys
from pegbox.errors import ConfigError
from pegbox.plan import compose

compose("{tmp_path}/c.yaml")
try:
    compose("{tmp_path}/c.yaml", ["optim.options.bettas=1"])
except ConfigError as error:
    print(error)
assert not {{"torch", "transformers"}} & sys.modules.keys()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "unknown key 'bettas' in section 'optim.options' (command line)" in ended.stdout
    assert "Did you mean 'betas'" in ended.stdout
