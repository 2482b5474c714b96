"""torch and the GPUs: whether the build, the driver and the devices fit together, and what the devices can do."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from pegbox_doctor.machine import gibibytes
from pegbox_doctor.report import Report

GROUP = "Accelerators"
QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")
GUIDE = "https://pytorch.org/get-started/locally"


def check_accelerators(report: Report) -> None:
    """What nvidia-smi sees, what torch sees, and whether the two agree."""
    seen = nvidia_smi(report)
    if find_spec("torch") is None:
        report.fact(GROUP, "torch", "not installed")
        return
    try:
        import torch
    except (Exception, SystemExit) as error:
        report.problem(
            f"torch cannot be imported: {type(error).__name__}: {error}",
            "Its installation is broken, or a library of the system that it needs is missing.",
            "Type: pip install --force-reinstall torch",
        )
        return
    build = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU"
    )
    report.fact(GROUP, "torch", f"{torch.__version__} (built for {build})")
    if build == "CPU":
        if seen:
            report.problem(
                f"torch {torch.__version__} is built for the CPU, but there is an NVIDIA GPU: {seen[0]}",
                "It would train on the CPU without a word.",
                f"Install a CUDA build of torch: {GUIDE}",
            )
    elif torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            _check_device(report, torch, index)
    elif seen:
        report.problem(
            f"torch {torch.__version__} ({build}) sees no GPU, but nvidia-smi does: {seen[0]}",
            _why_unavailable(torch),
            f"Install a newer driver, or a build of torch for the driver that is there: {GUIDE}",
        )
    if torch.backends.mps.is_available():
        report.fact(GROUP, "mps", "available")
    if build == "CPU" or not torch.cuda.is_available():
        report.fact(GROUP, "devices", "CPU only")


def nvidia_smi(report: Report) -> list[str]:
    """The GPUs that the driver knows, each as `name, driver version`; empty without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run([program, *QUERY], capture_output=True, text=True, timeout=30, check=False)
        failure = "" if done.returncode == 0 else (done.stdout + done.stderr).strip().partition("\n")[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        report.note(f"nvidia-smi cannot be run: {error}", "Whether there is an NVIDIA GPU is unknown.")
        return []
    if failure:
        report.note(f"nvidia-smi says: {failure}", "It is installed, but finds no working driver.")
        return []
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        report.fact(GROUP, f"nvidia-smi {index}", line)
    return lines


def _check_device(report: Report, torch: Any, index: int) -> None:
    properties = torch.cuda.get_device_properties(index)
    bfloat16 = torch.cuda.get_device_capability(index) >= (8, 0) or torch.version.hip is not None
    described = [
        properties.name,
        gibibytes(properties.total_memory),
        f"compute capability {properties.major}.{properties.minor}",
        f"bfloat16 {'yes' if bfloat16 else 'no'}",
    ]
    report.fact(GROUP, f"GPU {index}", ", ".join(described))
    architectures = torch.cuda.get_arch_list()
    if torch.version.cuda and not runs_on(architectures, properties.major, properties.minor):
        wanted = f"sm_{properties.major}{properties.minor}"
        report.problem(
            f"torch {torch.__version__} holds no code for GPU {index}, {properties.name} ({wanted})",
            f"It is built for {', '.join(architectures)}.",
            f"Install a build of torch for this GPU: {GUIDE}",
        )


def runs_on(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Whether code for one of these architectures runs on a device.

    Machine code (`sm_80`) runs on devices of the same major version and the same or a higher minor one; intermediate
    code (`compute_80`) on every newer device. A trailing a (`sm_90a`) binds code to exactly that device.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
        if match is None:
            continue
        code = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = code == (major, minor)
        elif match[1] == "sm":
            fits = code[0] == major and code[1] <= minor
        else:
            fits = code <= (major, minor)
        if fits:
            return True
    return False


def _why_unavailable(torch: Any) -> str:
    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())
    return "Its devices may be hidden (CUDA_VISIBLE_DEVICES)."
