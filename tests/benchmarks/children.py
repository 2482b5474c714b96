"""Contenders are measured in processes of their own, so that nothing is left of another one; none fails unseen."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Failed(Exception):
    """A process ended with an error, or did not end; the message says which."""


def answer(script: str, arguments: Sequence[str], title: str, log: Path, limit: float) -> Any:
    """What a script prints in its last line, as JSON.

    Args:
        title: stands in the log above all else that the script writes.
        limit: seconds that it may take.

    Raises:
        Failed: it took longer or ended with an error.
    """
    with log.open("a", encoding="utf-8") as file:
        print(f"\n== {title}", file=file, flush=True)
        begins = file.tell()
        try:
            done = subprocess.run(
                [sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=file, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than {limit:.0f} s") from None
        said = done.stdout.splitlines()
        print(*said[:-1] if done.returncode == 0 else said, sep="\n", file=file)
    if done.returncode:
        raise Failed(f"exit {done.returncode}: {_why(log, begins)}")
    return json.loads(said[-1])


def _why(log: Path, begins: int) -> str:
    """The last line of the log that names an error, or the last of all."""
    lines = [line.strip() for line in log.read_bytes()[begins:].decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.split(":")[0].split(".")[-1].endswith(("Error", "Exception"))]
    return (errors or lines or ["it said nothing"])[-1][:300]
