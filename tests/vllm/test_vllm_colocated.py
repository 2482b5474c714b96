"""vLLM in the trainer's process: what `colocated_checks.py` checks in vLLM's environment, and runs of GRPO there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from grpo_runs import Rewarding, rewards, run
from rollout_runs import REPOSITORY, VLLM_PYTHON

# One process does all checks.
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
CHECKS = Path(__file__).with_name("colocated_checks.py")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, int]:
    """Where the checks wrote, what they said, and how they ended."""
    assert VLLM_PYTHON.exists(), "vLLM is not installed; type: make vllm"
    folder = tmp_path_factory.mktemp("colocated") / "checks"
    words = [VLLM_PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", folder, CHECKS]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=840, check=False
    )
    return folder, done.stdout[-8000:] + done.stderr[-2000:], done.returncode


def test_every_check_of_vllm_in_the_trainers_process_holds(checked: tuple[Path, str, int]) -> None:
    _, said, code = checked
    assert code == 0, said


def test_grpo_with_vllm_in_process_has_the_rewards_of_one_on_a_server(
    checked: tuple[Path, str, int], undisturbed: list[float]
) -> None:
    assert rewards(checked[0] / "test_grpo_runs_lora_0") == pytest.approx(undisturbed, abs=1e-6)


def test_full_grpo_in_process_has_the_rewards_of_one_by_broadcast_and_of_one_by_disk(
    checked: tuple[Path, str, int], served: str, base: Path, tmp_path: Path
) -> None:
    inside = rewards(checked[0] / "test_grpo_runs_full_0")
    assert sum(inside[-2:]) / 2 > sum(inside[:2]) / 2 + 0.1
    for transfer in ("broadcast", "disk"):
        folder = tmp_path / transfer
        assert run(folder, base, Rewarding(), lora=False, url=served, transfer=transfer).reason == "finished"
        assert rewards(folder) == pytest.approx(inside, abs=1e-6)
