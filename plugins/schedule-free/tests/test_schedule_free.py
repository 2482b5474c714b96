"""Runs with a schedule-free optimizer, against the library used directly in a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.events import Evaluated, Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.run import execute
from pegbox.types import ModelRequest
from safetensors.torch import load_file

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")
DIRECT: dict[str, Any] = {
    "schedule_free_adamw": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.01, warmup_steps=2),
    "schedule_free_radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.01),
    "schedule_free_sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.01, warmup_steps=2),
}


class Watch:
    """Keeps the batches of each step, and the weights that an evaluation and a step saw."""

    def __init__(self) -> None:
        self.steps: list[list[Batch]] = []
        self.evaluated: dict[int, dict[str, torch.Tensor]] = {}
        self.trained: dict[int, dict[str, torch.Tensor]] = {}

    @hookimpl(wrapper=True)
    def build_batches(self, dataset: Any) -> Any:
        source = yield
        if dataset.split == "train":
            whole = type(source).__iter__
            kept = self.steps

            class Kept(type(source)):  # type: ignore[misc]
                def __iter__(self) -> Any:
                    for batches in whole(self):
                        kept.append(list(batches))
                        yield batches

            source.__class__ = Kept
        return source

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Evaluated | Stepped):
            kept = self.evaluated if isinstance(event, Evaluated) else self.trained
            kept[event.step] = {n: p.detach().clone() for n, p in event.model.module.named_parameters()}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, name: str, watch: object = None, **trainer: Any) -> Any:
    options = {"warmup_steps": 2} if name in ("schedule_free_adamw", "schedule_free_sgd") else {}
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "optim", "schedule-free", "trainer", *(["watch"] if watch else [])],
        "tiny_llama": {"eval_rows": 4, "rows": 24},
        "optim": {"name": name, "learning_rate": 0.01, "schedule": "constant", "options": options},
        "trainer": {"progress": "none", "max_steps": 6, "eval_every": 3, "device": "cpu", **trainer},
        "resume": "auto",
        "output": str(folder),
    }
    return execute(compose(config, instances={"watch": watch} if watch else None))


@pytest.mark.parametrize("name", DIRECT)
def test_a_run_evaluates_and_exports_the_librarys_averaged_weights(name: str, tmp_path: Path) -> None:
    watch = Watch()
    run(tmp_path / "run", name, watch, max_grad_norm=None)
    ctx = compose({"model": {"name": "tiny"}, "plugins": [TINY]})
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name="tiny", format="transformers"))
    optimizer = DIRECT[name](list(model.module.parameters()))
    optimizer.train()
    for step, batches in enumerate(watch.steps[:6], start=1):
        count = sum(batch.trained_tokens for batch in batches)
        for batch in batches:
            (-model.compute(model.module, batch, frozenset({"logps"})).logps_N.sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen = watch.trained[step]
        assert_close(model.module, seen)
        if step % 3 == 0:
            optimizer.eval()
            assert_close(model.module, watch.evaluated[step])
            # RAdam makes no step that counts before its variance is known, so its two sets are still one.
            assert "radam" in name or any(
                not torch.allclose(seen[n], watch.evaluated[step][n], atol=1e-6) for n in seen
            )
            if step < 6:
                optimizer.train()
    exported = load_file(tmp_path / "run" / "model.safetensors")
    assert_close(model.module, exported)


def assert_close(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("save_every", [2, 3])
def test_a_resumed_run_is_bit_identical_also_from_a_checkpoint_after_an_evaluation(
    save_every: int, tmp_path: Path
) -> None:
    run(tmp_path / "whole", "schedule_free_adamw", save_every=save_every)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", "schedule_free_adamw", Stop(save_every), save_every=save_every)
    run(tmp_path / "run", "schedule_free_adamw", save_every=save_every)
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


class Stop:
    """Breaks off a run after its first checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == self._step + 1:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": "schedule_free_adamw", "schedule": "linear"}, "Set optim.schedule to constant"),
        ({"name": "schedule_free_adamw", "schedule": "constant", "warmup_steps": 2}, "takes no warm-up"),
        ({"name": "schedule_free_adamv", "schedule": "constant"}, "or 'schedule_free_adamw'"),
    ],
)
def test_a_second_schedule_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "tiny"}, "plugins": ["optim", "schedule-free"], "optim": settings})


def test_the_plugin_without_its_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="remove schedule-free"):
        run(tmp_path / "run", "adamw")
