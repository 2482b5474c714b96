"""Whole runs of GRPO whose completions come from a real vLLM; its death in the middle of a run."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from grpo_runs import STEPS, Rewarding, rewards, run
from meddling import Proxy
from pegbox.errors import RunError
from rollout_runs import OWN, server_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


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
