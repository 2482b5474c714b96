"""The machine, torch and the hub: facts are true, and what does not fit together is found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pegbox_doctor import machine
from pegbox_doctor.accelerators import check_accelerators, runs_on
from pegbox_doctor.report import Report

Visit = Callable[..., tuple[int, dict[str, Any]]]
Check = Callable[..., dict[str, Any]]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of that name before all others: `sh` code."""

    def write(code: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        program = folder / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    return write


def test_a_cpu_build_of_torch_beside_an_nvidia_gpu_is_found(nvidia_smi: Callable[[str], None]) -> None:
    torch = pytest.importorskip("torch")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("needs a CPU build of torch")
    nvidia_smi("echo 'NVIDIA H100 80GB HBM3, 570.10'")
    report = Report()
    check_accelerators(report)
    (problem,) = report.problems
    assert torch.__version__ in problem.what
    assert "NVIDIA H100 80GB HBM3, 570.10" in problem.what
    assert "CUDA build" in problem.next


@pytest.mark.parametrize("code", ["echo 'No devices were found'; exit 6", "exit 9", "kill -9 $$"])
def test_an_nvidia_smi_without_a_driver_is_a_note(nvidia_smi: Callable[[str], None], code: str) -> None:
    nvidia_smi(code)
    report = Report()
    check_accelerators(report)
    assert report.problems == []


def test_a_torch_that_cannot_be_imported_is_found(check_alone: Check, tmp_path: Path) -> None:
    package = tmp_path / "broken" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')\n")
    report = check_alone("accelerators.check_accelerators(report)", PYTHONPATH=str(package.parent))
    (problem,) = report["problems"]
    assert "torch cannot be imported: OSError: libcudart.so.12" in problem["what"]
    assert "pip install" in problem["next"]


@pytest.mark.parametrize(
    ("architectures", "device", "fits"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_80"], (9, 0), False),
        (["sm_89"], (8, 0), False),
        (["sm_80", "compute_80"], (9, 0), True),
        (["compute_90"], (8, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100", "sm_120"], (12, 0), True),
        (["sm_100"], (12, 0), False),
        ([], (9, 0), False),
    ],
)
def test_code_runs_where_nvidia_says_that_it_does(
    architectures: list[str], device: tuple[int, int], fits: bool
) -> None:
    assert runs_on(architectures, *device) is fits


def test_facts_of_the_machine_are_those_of_the_system(visit: Visit, tmp_path: Path) -> None:
    _, report = visit()
    facts = report["facts"]["Machine"]
    assert int(facts["processors"]) == len(os.sched_getaffinity(0))
    free, total = shutil.disk_usage(tmp_path).free, shutil.disk_usage(tmp_path).total
    assert abs(float(facts["disk"].split()[0]) - free / 2**30) < max(2.0, total / 2**30 / 20)
    assert (
        0 < float(facts["memory"].split()[0]) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 + 0.1
    )


def test_an_output_below_a_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = Report()
    machine.check_output(report, tmp_path / "file" / "run")
    assert [problem.what for problem in report.problems] == [
        f"{tmp_path / 'file' / 'run'} cannot be written: {tmp_path / 'file'} is a file"
    ]


def test_too_little_free_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "LEAST_FREE_BYTES", shutil.disk_usage(tmp_path).total + 1)
    report = Report()
    machine.check_output(report, tmp_path / "run")
    (problem,) = report.problems
    assert "are free for" in problem.what


def test_looking_at_the_output_leaves_nothing_there(tmp_path: Path) -> None:
    machine.check_output(Report(), tmp_path / "runs" / "first")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_cache_that_cannot_be_written_is_found(check_alone: Check, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    report = check_alone("hub.check_hub(report)", HF_HOME=str(tmp_path / "file" / "cache"))
    (problem,) = report["problems"]
    assert f"{tmp_path / 'file'} is a file" in problem["what"]
    assert "HF_HOME" in problem["next"]


def test_a_token_is_found_and_never_shown(check_alone: Check, tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path / "hub")}
    report = check_alone("hub.check_hub(report)", HF_TOKEN="hf_secretsecretsecret", **home)
    assert report["facts"]["Hub"]["token"] == "found"
    assert "hf_secret" not in str(report)
    assert check_alone("hub.check_hub(report)", **home)["facts"]["Hub"]["token"] == "none"
