"""Whole runs of GRPO whose completions come from a real vLLM; its death in the middle of a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from meddling import Proxy
from pegbox.errors import RunError
from pegbox.events import Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.rollouts import RolloutBatch, Score
from rollout_runs import OWN, server_of

pytestmark = pytest.mark.vllm
STEPS = 8


class Rewarding:
    """Rewards even tokens; does something right after a step."""

    def __init__(self, after: int = 0, do: Callable[[], None] = lambda: None) -> None:
        self._after, self._do = after, do

    @hookimpl
    def score_rollouts(self, rollouts: RolloutBatch) -> Sequence[Score]:
        share = (sum(token % 2 == 0 for token in one.completion) / len(one.completion) for one in rollouts.rollouts)
        return [Score(name="even", values_R=tuple(share))]

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == self._after:
            self._do()


def run(folder: Path, base: Path, rewarding: Rewarding, resume: str | None = None, **section: Any) -> Any:
    """Train `base` with GRPO; returns the outcome."""
    from pegbox.plan import compose
    from pegbox.run import execute

    folder.mkdir(exist_ok=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"w{5 + row} w6 w7"}) + "\n" for row in range(64)), encoding="utf-8")
    config = {
        "model": {"name": str(base), "dtype": "float32"},
        "plugins": ["hf", "data", "lora", "rewarding", "grpo", "adamw", "trainer", "rollout-vllm"],
        "data": {"train": [{"path": str(rows), "format": "prompts", "options": {"chat_template": False}}]},
        "lora": {"r": 4, "alpha": 8},
        "grpo": {"samples": 16, "max_completion_length": 4},
        "adamw": {"learning_rate": 3e-2, "schedule": "constant"},
        "trainer": {
            "max_steps": STEPS,
            "batch": 4,
            "micro_batch": 4,
            "log_every": 1,
            "save_every": 1,
            "precision": "fp32",
            "progress": "none",
        },
        "rollout-vllm": section,
        "output": str(folder / "run"),
    }
    overrides = [f"resume={resume}"] if resume else []
    return execute(compose(config, overrides, instances={"rewarding": rewarding}))


def rewards(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [line["reward"] for line in lines if line.get("kind") == "train"]


@pytest.fixture(scope="module")
def undisturbed(served: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The rewards of a run with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(folder, base, Rewarding(), url=served).reason == "finished"
    return rewards(folder)


def test_a_run_learns_from_completions_of_vllm(undisturbed: list[float]) -> None:
    assert len(undisturbed) == STEPS
    assert sum(undisturbed[-2:]) / 2 > sum(undisturbed[:2]) / 2 + 0.1


def test_a_run_whose_server_is_killed_goes_on_as_if_nothing_had_happened(
    undisturbed: list[float], base: Path, tmp_path: Path
) -> None:
    # A path of its own, so that its server is not taken for the one of other tests.
    copied = shutil.copytree(base, tmp_path / "base")
    kill = Rewarding(2, lambda: os.kill(server_of(copied), signal.SIGKILL))
    assert run(tmp_path, copied, kill, **OWN).reason == "finished"
    assert (tmp_path / "run/vllm/server.log").read_text().count("\n$ ") == 1, "it was started a second time"
    assert rewards(tmp_path) == pytest.approx(undisturbed, abs=1e-6)


def test_a_run_whose_server_is_gone_for_good_leaves_a_checkpoint_to_go_on_from(
    undisturbed: list[float], served: str, base: Path, tmp_path: Path
) -> None:
    proxy = Proxy(served)
    with pytest.raises(RunError, match=r"(?s)is gone.*resume=auto"):
        run(tmp_path, base, Rewarding(3, proxy.close), url=proxy.url)
    again = Proxy(served, proxy.port)
    assert run(tmp_path, base, Rewarding(), resume="auto", url=again.url).reason == "finished"
    assert rewards(tmp_path) == pytest.approx(undisturbed, abs=1e-6)
    again.close()
