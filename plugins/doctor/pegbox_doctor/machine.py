"""Python, processors, memory, and the disk that a run would write to."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

from pegbox_doctor.report import Report

LEAST_FREE_BYTES = 1 << 30
"""Less free disk than this holds no checkpoint worth having."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_machine(report: Report) -> None:
    """Facts alone: no machine is wrong by itself."""
    group = "Machine"
    report.fact(group, "python", f"{platform.python_version()} ({sys.executable})")
    report.fact(group, "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.fact(group, "processors", usable)
    total_bytes = memory_bytes()
    if total_bytes:
        report.fact(group, "memory", gibibytes(total_bytes))


def memory_bytes() -> int | None:
    """The memory of this machine, or of the container if that is less; None if it cannot be told."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [
        text for path in map(Path, CGROUP_LIMITS) if path.is_file() and (text := path.read_text().strip()).isdigit()
    ]
    return min([total, *map(int, limits)])


def check_output(report: Report, folder: Path) -> None:
    """The disk of the output folder: how much is free, and whether a run may write there."""
    place = nearest_existing(folder)
    free_bytes = shutil.disk_usage(place).free
    report.fact("Machine", "disk", f"{gibibytes(free_bytes)} free for {folder}")
    if free_bytes < LEAST_FREE_BYTES:
        report.problem(
            f"{gibibytes(free_bytes)} are free for {folder}",
            "A run writes checkpoints and the trained model there.",
            "Free some space, or name another disk: output=/other/disk/run",
        )
    refused = why_not_writable(folder)
    if refused:
        report.problem(
            f"{folder} cannot be written: {refused}", "A run writes there.", "Name another folder: output=..."
        )


def nearest_existing(path: Path) -> Path:
    """The path itself, or the first one above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def why_not_writable(folder: Path) -> str:
    """Why no file can be made in a folder (or, where it does not exist yet, the folder itself); empty if one can."""
    place = nearest_existing(folder)
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place):
            return ""
    except OSError as error:
        return f"{error.strerror} ({place})"


def gibibytes(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
