"""A real ablation on the CPU, held to what plain runs of the same configs say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from ablated_config import tiny
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_ablate.ablation import Ablation, ablate
from pegbox_ablate.report import text, to_json

torch = pytest.importorskip("torch")
STEPS, WARMUP = 6, 2


@dataclass(frozen=True)
class Made:
    """An ablation, what its runs left, and the user's folder before and after."""

    ablation: Ablation
    runs: Path
    config: Mapping[str, Any]
    told: tuple[str, ...]
    before: Mapping[str, bytes]
    after: Mapping[str, bytes]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Equal to the bit needs the same number of threads, here and in the processes that are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """One plugin that changes nothing, one that changes training, one whose absence the run refuses."""
    user, runs = tmp_path_factory.mktemp("user"), tmp_path_factory.mktemp("runs")
    config = tiny("idle", "asks_for_idle", "slower_mix")
    config |= {"output": str(user / "run"), "slower_mix": {"scale": 0.2}}
    config["trainer"] |= {"eval_every": 1, "save_every": 1, "best": "eval_loss"}
    (user / "config.yaml").write_text(yaml.safe_dump(config))
    (user / "run").mkdir()
    (user / "run" / "run.json").write_text("{}")
    before = contents(user)
    told: list[str] = []
    ablation = ablate(str(user / "config.yaml"), ["seed=3"], folder=runs, steps=STEPS, warmup=WARMUP, tell=told.append)
    return Made(ablation, runs, {**config, "seed": 3}, tuple(told), before, contents(user))


def resolved(made: Made, run: str) -> dict[str, Any]:
    """The resolved config that a run wrote about itself."""
    return dict(yaml.safe_load((made.runs / run / "run" / "config.yaml").read_text()))


def plain_losses(config: Mapping[str, Any], folder: Path) -> list[float]:
    """The losses of a plain run of this config, without Pegbox's command and its observer."""
    trainer = {**config["trainer"], "log_every": 1, "save_every": None, "eval_every": None}
    del trainer["best"]
    execute(compose({**config, "trainer": trainer, "output": str(folder)}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"][:STEPS]


def test_each_run_lacks_one_plugin_and_lies_between_two_that_have_all(made: Made) -> None:
    folders = sorted(path.name for path in made.runs.iterdir())
    assert folders == [
        "01-all-plugins",
        "02-without-idle",
        "03-without-asks_for_idle",
        "04-all-plugins",
        "05-without-slower_mix",
        "06-all-plugins",
    ]
    assert [line.partition(": ")[2].replace(" ", "-") for line in made.told] == [name[3:] for name in folders]
    whole = resolved(made, "01-all-plugins")
    assert resolved(made, "04-all-plugins")["plugins"] == whole["plugins"]
    left_out = resolved(made, "05-without-slower_mix")
    assert "slower_mix" in whole
    assert "slower_mix" not in left_out
    assert left_out["plugins"] == [name for name in whole["plugins"] if not name.endswith("slower_mix.py")]
    assert {key: value for key, value in whole.items() if key not in ("slower_mix", "plugins", "output")} == {
        key: value for key, value in left_out.items() if key not in ("plugins", "output")
    }
    assert made.ablation.rounds["slower_mix"][0].left_out.plugins == (
        "tiny_run",
        "idle",
        "asks_for_idle",
        "sft",
        "trainer",
    )


def test_a_needed_plugin_is_named_with_the_reason(made: Made) -> None:
    assert made.ablation.needed == {
        "tiny_run": "no active plugin owns load_processor",
        "sft": "no active plugin owns build_loss",
        "trainer": "no active plugin owns build_runtime",
    }
    refused = made.ablation.failures["idle"]
    assert (refused.refused, refused.what) == (True, "idle is not there, and somebody asks for it")
    assert "idle: needed: idle is not there, and somebody asks for it" in text(made.ablation)


def test_a_plugin_that_changes_nothing_has_a_difference_of_zero_at_every_step(made: Made) -> None:
    found, _ = made.ablation.differences
    assert found.plugin == "asks_for_idle"
    assert found.loss == (0.0,) * STEPS
    assert "the same loss at every step" in text(made.ablation)


def test_a_plugin_that_changes_training_shows_the_difference_of_two_plain_runs(made: Made, tmp_path: Path) -> None:
    _, found = made.ablation.differences
    whole = plain_losses(made.config, tmp_path / "with")
    slim = {key: value for key, value in made.config.items() if key != "slower_mix"}
    slim["plugins"] = [name for name in slim["plugins"] if not name.endswith("slower_mix.py")]
    left_out = plain_losses(slim, tmp_path / "without")
    assert found.loss == tuple(one - other for one, other in zip(whole, left_out, strict=True))
    assert found.loss[0] == 0.0
    assert found.loss[-1] != 0.0
    assert "right if it changes training, wrong for a kernel" in text(made.ablation)


def test_runs_write_no_checkpoint_export_or_evaluation_and_leave_the_users_folders_alone(made: Made) -> None:
    assert made.after == made.before
    written = {path.name for path in made.runs.rglob("*") if path.is_file()}
    assert written == {"config.yaml", "run.json", "metrics.jsonl", "log.txt", "result.json"}
    for metrics in made.runs.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [(line["kind"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("train", 6)]


def test_speed_is_that_of_the_timed_steps_alone(made: Made) -> None:
    folder, run = made.runs / "05-without-slower_mix", made.ablation.rounds["slower_mix"][0].left_out
    logged = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = [line for line in logged if line["step"] > WARMUP]
    tokens = sum(2 * line["tokens_per_step"] for line in timed)
    seconds = sum(2 * line["tokens_per_step"] / line["tokens_per_s"] for line in timed)
    assert run.tokens_per_s == pytest.approx(tokens / seconds)
    assert run.memory == "peak RSS"
    assert 100 << 20 < run.peak_bytes < 8 << 30


def test_json_holds_each_run_and_each_difference(made: Made) -> None:
    read = json.loads(to_json(made.ablation))
    assert len(read["base"]) == 3
    assert [row["plugin"] for row in read["differences"]] == ["asks_for_idle", "slower_mix"]
    found, run = made.ablation.differences[1], made.ablation.rounds["slower_mix"][0].left_out
    assert tuple(read["differences"][1]["loss"]) == found.loss
    assert read["left_out"]["slower_mix"][0]["tokens_per_s"] == run.tokens_per_s
    assert read["spread"]["loss"] == [0.0] * STEPS
    assert set(read["needed"]) == {"tiny_run", "sft", "trainer"}
