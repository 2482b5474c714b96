"""What the core costs: lines, dependencies, start-up, time per training step, each beside its bound.

    python tests/benchmarks/core_overhead.py [--repeats 20]

Start-up is a multiple of `python -c pass`: both are measured in turn, in one loop, so that a busy machine
slows both. The time per step is what the kernel adds to it: one event to all observers, one random source.
"""

from __future__ import annotations

import argparse
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import requires, version
from pathlib import Path

from code_lines import code_lines, core_files

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "examples" / "quickstart" / "config.yaml"
STEPS = 2000


def seconds(command: Sequence[str]) -> float:
    """Wall-clock seconds of one run of a command."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def multiples(commands: dict[str, list[str]], repeats: int) -> tuple[float, dict[str, float]]:
    """Median seconds of `python -c pass`, and the median of each command as a multiple of it."""
    everything = {"pass": [sys.executable, "-c", "pass"], **commands}
    taken: dict[str, list[float]] = {name: [] for name in everything}
    for command in everything.values():
        seconds(command)
    for _ in range(repeats):
        for name, command in everything.items():
            taken[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in taken.items()}
    floor = medians.pop("pass")
    return floor, {name: value / floor for name, value in medians.items()}


def microseconds_per_call(call: Callable[[int], object]) -> float:
    """Median over 5 rounds of the mean of `STEPS` calls, after a warm-up."""
    rounds = []
    for _ in range(6):
        start = time.perf_counter()
        for step in range(STEPS):
            call(step)
        rounds.append((time.perf_counter() - start) / STEPS * 1e6)
    return statistics.median(rounds[1:])


def kernel_step() -> tuple[float, int]:
    """Microseconds of the kernel in each step of the quickstart with more observers, and how many more."""
    from pegbox.events import Stepped
    from pegbox.hooks import hookimpl
    from pegbox.plan import compose

    class Observer:
        @hookimpl
        def on_event(self, event: object) -> None:
            return None

    observers = {f"observer{number}": Observer() for number in range(3)}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        listed = re.search(r"^plugins:\s*\[(.*)\]", CONFIG.read_text(), re.MULTILINE)
        names = ", ".join([listed.group(1) if listed else "", *observers])
        config.write_text(f"extends: {CONFIG}\nplugins: [{names}]\noutput: {folder}/run\n")
        ctx = compose(config, instances=observers)
    event = Stepped(step=1, model=None, optimizer=None, loss=None)  # type: ignore[arg-type]

    def step(number: int) -> None:
        ctx.notify(event)
        ctx.rng("data", number)

    return microseconds_per_call(step), len(observers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each command (default 20)")
    repeats = parser.parse_args().repeats

    lines = sum(code_lines(path.read_text()) for path in core_files(ROOT))
    dependencies = [text for text in requires("pegbox-core") or [] if "extra ==" not in text]
    pegbox = str(Path(sysconfig.get_path("scripts")) / "pegbox")
    commands = {
        "pegbox --help": [pegbox, "--help"],
        "pegbox plan, quickstart": [pegbox, "plan", str(CONFIG)],
    }
    floor, times = multiples(commands, repeats)
    step, observers = kernel_step()
    rows = [
        ("core, code lines", f"{lines:,}", "<= 1,550"),
        ("third-party dependencies of the core", f"{len(dependencies)}", "<= 4"),
        ("pegbox --help", f"{times['pegbox --help']:.1f} x python -c pass", "<= 12 x"),
        ("pegbox plan, quickstart", f"{times['pegbox plan, quickstart']:.1f} x python -c pass", "<= 25 x"),
        (f"kernel per step, {observers} observers", f"{step:.1f} us", "<= 50 us"),
    ]
    packages = ", ".join(f"{name} {version(name)}" for name in ("pluggy", "pydantic", "typer"))
    print(f"Python {platform.python_version()}, {packages}")
    print(f"python -c pass: {floor * 1e3:.1f} ms (medians of {repeats})\n")
    for name, value, bound in rows:
        print(f"{name:40}{value:>26}   {bound}")


if __name__ == "__main__":
    main()
