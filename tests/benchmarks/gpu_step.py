"""Measures a whole training step of full-size models on one GPU, beside TRL in the same run.

    python tests/benchmarks/gpu_step.py [CASE ...] [--contenders NAME ...] [--results CSV] [--profile N] [--tiny]

Models have the published shapes and random bf16 weights, made on the GPU; rows are random tokens of one length, all of
them trained. Every contender is a process of its own. It waits for the device after each step; the median of those
after the first four counts. LoRA has rank 16. TRL runs as its users run it: gradient checkpointing, Liger kernels and
the fastest attention that is installed; its router loss is off, as ours is. Unsloth, which needs a TRL of its own, runs
where it is installed. Losses of a case must agree: both begin at
the same weights. What a contender writes goes to a log beside the results. `--profile N` prints the N kernels that take
most of a step and the part of it in which the GPU does nothing. `--tiny` has two small layers, so that everything can
be tried in a minute; without a GPU it leaves out what needs one.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from children import Failed, answer
from step_cases import CASES, Case, filled, shrunk
from step_peers import RANK, rows_of, run_trl, run_unsloth
from step_watch import WARM_UP, Watch, device

SAME_LOSS = 0.02


class Synthetic:
    """The plugin that stands for data and checkpoint: rows of one length, weights made on the GPU; measures."""

    def __init__(self, case: Case, watch: Watch) -> None:
        from pegbox.hooks import hookimpl

        self.rows, self.watch = rows_of(case), watch
        self.split, self.fingerprint = "train", "synthetic"
        for name in (
            "configure_model",
            "load_processor",
            "build_dataset",
            "register_items",
            "export_model",
            "on_event",
        ):
            hookimpl(getattr(type(self), name))
        hookimpl(wrapper=True)(type(self).load_model)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        from pegbox.rows import Example

        return Example(input_ids=self.rows[index], labels=self.rows[index])

    def describe(self, index: int) -> str:
        return f"synthetic row {index}"

    def configure_model(self) -> Any:
        from pegbox.types import ModelOptions

        return ModelOptions(empty=True)

    def load_model(self) -> Generator[None, Any, Any]:
        model = yield
        filled(model.module)
        return model

    def load_processor(self) -> Any:
        from pegbox.types import Processor

        return Processor(tokenizer=None, pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

    def build_dataset(self, split: str) -> Any:
        return self if split == "train" else None

    def register_items(self) -> Any:
        from pegbox.types import Item

        return [Item(kind="export_format", name="peft", target="nothing is written")]

    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]

    def on_event(self, event: Any) -> None:
        from pegbox.events import RunStarted, Stepped

        if isinstance(event, RunStarted):
            self.watch.trains(event.job.model.module)
        elif isinstance(event, Stepped):
            self.watch.stepped()
            self.watch.loss = float(event.loss)
            if event.step == self.watch.steps:
                raise Finished


class Finished(Exception):
    """Ends a run before its last checkpoint: all is measured."""


def run_pegbox(case: Case, sections: Mapping[str, Mapping[str, Any]], watch: Watch) -> None:
    """The usual plugins and those of `sections`."""
    import transformers
    from pegbox.plan import compose
    from pegbox.run import execute

    folder = Path(tempfile.mkdtemp())
    getattr(transformers, case.config)(
        **case.fields, dtype="bfloat16", architectures=[case.config.replace("Config", "ForCausalLM")]
    ).save_pretrained(folder)
    targets: dict[str, Any] = {"targets": case.lora["target_modules"]}
    if "target_parameters" in case.lora:
        targets["parameters"] = case.lora["target_parameters"]
    filled_in = {
        "hf": {},
        "lora": {"r": RANK, "alpha": 2 * RANK, **targets},
        **sections,
        "sft": {},
        "optim": {"learning_rate": 1e-4},
        "trainer": {
            "max_steps": watch.steps,
            "batch": case.rows,
            "micro_batch": case.rows,
            "precision": "bf16",
            "shuffle": False,
            "log_every": 10_000,
            "save_every": None,
            "progress": "none",
        },
    }
    config = {
        "model": {"name": str(folder), "dtype": "bfloat16"},  # As on a GPU, also where there is none.
        "plugins": ["hf", "synthetic", *[name for name in filled_in if name != "hf"]],
        "use": {"load_processor": "synthetic", "export_model[peft]": "synthetic"},
        **{name: section for name, section in filled_in.items() if section},
        "output": str(folder / "run"),
    }
    with suppress(Finished):
        execute(compose(config, instances={"synthetic": Synthetic(case, watch)}))


def contenders(case: Case) -> dict[str, Callable[[Watch], None]]:
    """By name: everything on, one plugin less each; TRL with each attention that fits; Unsloth if it is there."""
    every = dict(case.ours)
    ours: dict[str, dict[str, Mapping[str, Any]]] = {"pegbox": every}
    ours["pegbox, full recompute"] = {**every, "activations": {"policy": "full"}}
    for name in every:
        ours[f"pegbox without {name}"] = {other: section for other, section in every.items() if other != name}
    sinks = case.config == "GptOssConfig"
    owner, key = ("gpt-oss-attention", "backend") if sinks else ("attention", "implementation")
    for attention in ("pegbox", "flash-attn-4") if device() == "cuda" else ():
        ours[f"pegbox, attention {attention}"] = {**every, owner: {key: attention}}
    found: dict[str, Callable[[Watch], None]] = {
        name: lambda watch, sections=sections: run_pegbox(case, sections, watch)  # type: ignore[misc]
        for name, sections in ours.items()
    }
    for attention in ("flash_attention_4", *(() if sinks else ("sdpa",))):
        found[f"trl + liger + {attention}"] = lambda watch, attention=attention: run_trl(case, attention, watch)  # type: ignore[misc]
    if not sinks and find_spec("unsloth"):
        found["unsloth"] = lambda watch: run_unsloth(case, watch)
    return found


def line(case: str, contender: str, options: argparse.Namespace, log: Path) -> tuple[dict[str, str], list[str]]:
    """The figures of one contender, measured in a process of its own, and lines about its kernels."""
    row = {"case": case, "contender": contender}
    arguments = [case, "--contenders", contender, "--child", "--profile", str(options.profile)]
    try:
        found = answer(__file__, [*arguments, *["--tiny"] * options.tiny], f"{case}: {contender}", log, options.limit)
    except Failed as failed:
        return {**row, "status": str(failed)}, []
    shape = shrunk(CASES[case]) if options.tiny else CASES[case]
    seconds = statistics.median(found["seconds"][WARM_UP:])
    return {
        **row,
        "status": "ok",
        "tokens_per_s": f"{shape.rows * shape.length / seconds:.0f}",
        "step_ms": f"{1e3 * seconds:.1f}",
        "peak_bytes": str(found["peak_bytes"]),
        "reserved_bytes": str(found["reserved_bytes"]),
        "trained": str(found["trained"]),
        "last_loss": f"{found['loss']:.4f}",
        "first_step_s": f"{found['seconds'][0]:.1f}",
        "gpu": found["gpu"],
        "torch": found["torch"],
    }, found["kernels"]


def child(options: argparse.Namespace) -> None:
    """Measure one contender; the last line of the output has what was found."""
    logging.basicConfig(level=logging.INFO)
    case = CASES[options.cases[0]]
    watch = Watch(options.profile)
    contenders(shrunk(case) if options.tiny else case)[options.contenders[0]](watch)
    print("\n" + json.dumps(watch.found()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--contenders", nargs="*", help="their names; all without it")
    parser.add_argument("--results", type=Path, help="a CSV file; what contenders write goes beside it")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N largest kernels")
    parser.add_argument("--tiny", action="store_true", help="two small layers, on whatever device is there")
    parser.add_argument("--limit", type=float, default=180, help="seconds that a contender may take")
    parser.add_argument("--commit", default="")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if device() == "cpu" and not options.tiny:
        parser.error("there is no GPU; with --tiny everything is tried on a CPU")
    for case in options.cases:
        if case not in CASES:
            parser.error(f"there is no case {case!r}; there are: {'; '.join(CASES)}")
    for case in options.cases or CASES:
        unknown = set(options.contenders or ()) - set(contenders(CASES[case]))
        if unknown:
            parser.error(f"{case} has no contender {sorted(unknown)}; it has: {'; '.join(contenders(CASES[case]))}")
    return options


def main() -> None:
    options = parsed()
    if options.child:
        child(options)
        return
    where = {
        "commit": options.commit or subprocess.getoutput("git describe --always --dirty"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    log = options.results.with_suffix(".log") if options.results else Path(tempfile.mkdtemp()) / "gpu_step.log"
    lines: list[dict[str, str]] = []
    wrong: list[str] = []
    for case in options.cases or CASES:
        losses: dict[str, float] = {}
        trained: dict[str, str] = {}
        for contender in options.contenders or contenders(CASES[case]):
            began = time.perf_counter()
            row, kernels = line(case, contender, options, log)
            lines.append({**row, **where})
            print(
                "  ".join(row.values()), f"  ({time.perf_counter() - began:.0f} s)", *kernels, sep="\n    ", flush=True
            )
            if row["status"] == "ok":
                losses[contender], trained[contender] = float(row["last_loss"]), row["trained"]
            else:
                wrong.append(f"{case}: {contender}: {row['status']}")
            if options.results:
                with options.results.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(max(lines, key=len)))
                    writer.writeheader()
                    writer.writerows(lines)
        if losses and max(losses.values()) - min(losses.values()) > SAME_LOSS:
            wrong.append(f"{case}: contenders do not reach the same loss: {losses}")
        if len(set(trained.values())) > 1:
            wrong.append(f"{case}: contenders do not train as many parameters: {trained}")
    if wrong:
        raise SystemExit("\n".join([*wrong, f"what they wrote is in {log}"]))


if __name__ == "__main__":
    main()
