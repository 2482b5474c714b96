"""The quickstart: fine-tune a small model on the CPU, and see what it learnt. `make quickstart` runs it.

What trains is what `pegbox run examples/quickstart/config.yaml` starts, with one more plugin: before_and_after.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from pegbox.context import Context
from pegbox.errors import PegboxError
from pegbox.plan import compose
from pegbox.render import log_to_terminal, show_short
from pegbox.run import execute

HERE = Path(__file__).parent
CONFIG = HERE / "config.yaml"


def main(overrides: Sequence[str]) -> int:
    """Train, compare, and return the exit code: 0 done, 1 the run failed or was interrupted, 2 the input is wrong."""
    began = time.perf_counter()
    try:
        planned = compose(CONFIG, overrides)
        output = free(Path(planned.config.run.output))
        plugins = [*planned.config.run.plugins, "./before_and_after.py"]
        ctx = compose(CONFIG, [*overrides, f"output={output}", f"plugins=[{', '.join(plugins)}]"])
        log_to_terminal(rank=0)
        if output != Path(planned.config.run.output):
            print(f"{planned.config.run.output} exists already; this run goes to {output}.\n")
        show_short(ctx)
        print("The first time, the model is converted from GGUF: some seconds.", flush=True)
        outcome = execute(ctx)
    except PegboxError as error:
        print(f"\n{error}", file=sys.stderr)
        return error.exit_code
    if outcome.reason == "interrupted":
        print(f"\nInterrupted. To go on: {pegbox()} run {short(CONFIG)} output={output} resume=auto")
        return 1
    report(ctx, output, time.perf_counter() - began)
    return 0


def free(output: Path) -> Path:
    """The folder, or the first of output-2, output-3 ... that does not exist."""
    names = (output if n == 1 else output.with_name(f"{output.name}-{n}") for n in count(1))
    return next(name for name in names if not name.exists())


def report(ctx: Context, output: Path, took_s: float) -> None:
    """Print what training changed, and what to type next."""
    seen = ctx.kernel.active["before_and_after"].instance
    first, last = seen.losses[min(seen.losses)], seen.losses[max(seen.losses)]
    print(
        f"Held-out loss: {first:.3f} before, {last:.3f} after. The whole quickstart took {took_s / 60:.1f} minutes.\n"
    )
    print("Type next:")
    for command, why in (
        (f"chat {output}", "talk to it"),
        (f'chat {output} --temperature 0 --message "Show how much disk space is free"', "ask it one thing"),
        (f"plan {short(CONFIG)}", "what a run does, and who does it"),
        (f"run {short(CONFIG)} output=runs/second trainer.max_steps=120", "train longer"),
    ):
        print(f"  {pegbox()} {command:<80} # {why}")


def pegbox() -> str:
    """The command as it can be typed here, with or without the environment activated."""
    script = Path(sys.executable).with_name("pegbox")
    return str(short(script)) if script.is_relative_to(Path.cwd()) else "pegbox"


def short(path: Path) -> Path:
    """The path from the current folder, if it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
