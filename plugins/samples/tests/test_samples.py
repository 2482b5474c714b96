"""Samples are what the model would say, at every evaluation, and leave no trace."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox.context import Context
from pegbox.errors import ConfigError
from pegbox.events import Evaluated, RunStarted
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Example
from pegbox.run import execute
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import TinyExamples, plain_model, tiny_model, tiny_processor
from pegbox.types import Processor
from safetensors.torch import load_file

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Rows(TinyExamples):
    """The first four bytes of each text are the prompt."""

    def __getitem__(self, index: int) -> Example:
        ids = super().__getitem__(index).input_ids
        return Example(input_ids=ids, labels=[UNTRAINED] * 4 + list(ids[4:]))


def job(model: Any, texts: list[str] | None = None) -> Any:
    source = SimpleNamespace(examples=Rows(texts if texts is not None else ["abcdef", "12345678"], "eval"))
    return SimpleNamespace(model=model, eval=source)


def started(folder: Path, run_job: Any, **settings: Any) -> Context:
    config = {"model": {"name": "tiny"}, "plugins": ["samples"], "samples": settings, "output": str(folder / "run")}
    ctx = compose(config)
    ctx.runtime, ctx.processor = FakeRuntime(), tiny_processor()
    ctx.notify(RunStarted(job=run_job, step=0))
    return ctx


def written(folder: Path, step: int) -> list[dict[str, Any]]:
    path = folder / "samples" / f"step-{step:08d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy(module: Any, text: str, count: int) -> str:
    """The likeliest bytes one after the other, without a cache."""
    ids = list(text.encode())
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tiny_processor().tokenizer.decode(ids[len(text) :])


def test_a_greedy_sample_is_the_likeliest_continuation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.module.generation_config.eos_token_id = None
    ctx = started(tmp_path, job(model), prompts=["2+2="], rows=2, max_new_tokens=6)
    ctx.notify(Evaluated(step=5, model=model, metrics={}))
    rows = written(ctx.folder, 5)
    model.module.eval()
    ids = [257, *b"2+2="]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert rows[0]["completion"] == tiny_processor().tokenizer.decode(ids[5:])
    assert [row["completion"] for row in rows[1:]] == [greedy(model.module, t, 6) for t in ("abcd", "1234")]
    assert [row["source"] for row in rows] == ["samples.prompts[0]", "text 0", "text 1"]
    assert [row["reference"] for row in rows] == [None, "ef<eos>", "5678<eos>"]
    assert "samples.prompts[0]" in capsys.readouterr().out


def test_modes_and_random_generators_are_as_before(tmp_path: Path) -> None:
    model = tiny_model()
    model.module.model.layers[0].eval()
    modes = [part.training for part in model.module.modules()]
    ctx = started(tmp_path, job(model), rows=1, temperature=1.0, max_new_tokens=4, show=False)
    before = torch.get_rng_state()
    ctx.notify(Evaluated(step=1, model=model, metrics={}))
    assert torch.equal(before, torch.get_rng_state())
    assert [part.training for part in model.module.modules()] == modes
    first = written(ctx.folder, 1)
    torch.manual_seed(99)
    ctx.notify(Evaluated(step=1, model=model, metrics={}))
    assert written(ctx.folder, 1) == first
    ctx.notify(Evaluated(step=2, model=model, metrics={}))
    assert written(ctx.folder, 2)[0]["completion"] != first[0]["completion"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    model = tiny_model()
    ctx = started(tmp_path, job(model), rows=1, max_new_tokens=2)
    ctx.runtime.rank = 1
    ctx.notify(Evaluated(step=1, model=model, metrics={}))
    assert not (ctx.folder / "samples").exists()


class Bytes:
    """Gives the tiny run a tokenizer."""

    @hookimpl(wrapper=True)
    def load_processor(self) -> Generator[None, Processor, Processor]:
        made = yield
        return replace(tiny_processor(), pad_id=made.pad_id)


def run(folder: Path, *plugins: str) -> dict[str, torch.Tensor]:
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "bytes", "sft", "adamw", "trainer", *plugins],
        "tiny_llama": {"rows": 16, "eval_rows": 6, "dropout": 0.1, "shortest": 8},
        "trainer": {"progress": "none", "max_steps": 4, "eval_every": 2, "save_every": None, "device": "cpu"},
        **({"samples": {"rows": 2, "max_new_tokens": 4, "temperature": 1.0}} if plugins else {}),
        "output": str(folder),
    }
    execute(compose(config, instances={"bytes": Bytes()}))
    return load_file(folder / "model.safetensors")


def test_a_run_is_the_same_with_and_without_samples(tmp_path: Path) -> None:
    without, with_samples = run(tmp_path / "without"), run(tmp_path / "with", "samples")
    assert all(torch.equal(with_samples[name], tensor) for name, tensor in without.items())
    assert len(written(tmp_path / "with", 2)) == len(written(tmp_path / "with", 4)) == 2


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (lambda: SimpleNamespace(model=tiny_model(), eval=None), {}, "no held-out rows"),
        (lambda: job(plain_model()), {}, "cannot generate"),
        (lambda: job(tiny_model()), {"rows": 3}, r"Set samples\.rows to 2"),
        (lambda: job(tiny_model(), ["abc"]), {"rows": 1}, "only 0 held-out rows"),
    ],
)
def test_a_run_that_could_not_have_samples_stops_before_its_first_step(
    make: Any, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        started(tmp_path, make(), **settings)


@pytest.mark.parametrize(("settings", "says"), [({"rows": 0}, "remove the plugin"), ({"top_p": 0.5}, "remove top_p")])
def test_settings_that_would_do_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "tiny"}, "plugins": ["samples"], "samples": settings})
