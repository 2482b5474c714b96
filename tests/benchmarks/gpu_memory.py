"""Measures on one GPU what `pegbox memory` estimates: allocated, reserved and the whole process, beside each other.

    python tests/benchmarks/gpu_memory.py [--results CSV] [--only NAME ...]

Each contender trains a model with random weights (the architecture of Qwen3-0.6B, or of Llama-8B) for some steps on
rows of one length, every token trained. The estimate is made first, in the same process, on the same config.
`allocated` is compared with torch's `max_memory_allocated`, `reserved` with `max_memory_reserved`, and `process` with
what the driver says this process has (all memory in use, less what was in use before it began). A line is red if the
first is off by more than 10 %.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.types import Example, Item, Processor
from pegbox_memory.estimate import estimate

STEPS, SLACK = 6, 0.1
QWEN = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@dataclass(frozen=True)
class Contender:
    """One line: which model, rows of which length, and the sections of its plugins."""

    name: str
    shape: Mapping[str, Any]
    rows: int
    tokens: int
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


LORA = {"lora": {"r": 16, "alpha": 32, "targets": "all-linear"}}
CHUNKED: dict[str, dict[str, Any]] = {"chunked-cross-entropy": {}}
FULL_RECOMPUTE: dict[str, dict[str, Any]] = {"activations": {"policy": "full"}}
CONTENDERS = (
    Contender("0.6B lora", QWEN, 4, 2048, LORA | CHUNKED),
    Contender("0.6B lora, whole head", QWEN, 1, 2048, LORA),
    Contender("0.6B lora, recomputed", QWEN, 4, 4096, LORA | CHUNKED | FULL_RECOMPUTE),
    Contender(
        "0.6B lora, recomputed but attention",
        QWEN,
        4,
        4096,
        LORA | CHUNKED | {"activations": {"policy": "full", "keep": "attention"}},
    ),
    Contender("0.6B lora, auto", QWEN, 4, 4096, LORA | CHUNKED | {"activations": {"policy": "auto"}}),
    Contender("0.6B lora, packed", QWEN, 4, 4096, LORA | CHUNKED | {"packing": {"length": 4096}}),
    Contender("0.6B full", QWEN, 2, 2048, CHUNKED),
    Contender("0.6B full, recomputed", QWEN, 4, 4096, CHUNKED | FULL_RECOMPUTE),
    Contender("0.6B lora, nf4", QWEN, 4, 2048, LORA | CHUNKED | {"bnb": {}}),
    Contender("8B lora, recomputed", LLAMA, 2, 4096, LORA | CHUNKED | FULL_RECOMPUTE),
    Contender("8B lora, auto", LLAMA, 2, 4096, LORA | CHUNKED | {"activations": {"policy": "auto"}}),
)


class Rows:
    """Rows of one length, every token trained."""

    split, fingerprint = "train", "rows of one length"

    def __init__(self, count: int, length: int) -> None:
        self._count, self._ids = count, [1 + at % 30000 for at in range(length)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return Example(input_ids=self._ids, labels=self._ids)

    def describe(self, index: int) -> str:
        return f"row {index}"


class Measured(Exception):
    """Ends a run whose numbers are known."""


class Synthetic:
    """Owns the data, and reads the allocator after the last step."""

    def __init__(self, contender: Contender) -> None:
        half = 2 if "packing" in contender.sections else 1
        self._rows = Rows(STEPS * contender.rows * half, contender.tokens // half)
        self._export = "peft" if "lora" in contender.sections else "transformers"
        self._before = used_bytes()
        self.allocated = self.reserved = self.process = 0

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="export_format", name=self._export, target="nothing is written")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return self._rows if split == "train" else None

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif isinstance(event, Stepped) and event.step == STEPS:
            torch.cuda.synchronize()
            self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            self.process = used_bytes() - self._before
            raise Measured


def used_bytes() -> int:
    """Memory of the GPU in use by anyone, asked of the driver without making a context here."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def config_of(contender: Contender, model: Path, output: Path) -> dict[str, Any]:
    """The config of a run."""
    export = "peft" if "lora" in contender.sections else "transformers"
    first = [name for name in ("packing", "bnb") if name in contender.sections]
    return {
        "model": {"name": str(model), "dtype": "bfloat16"},
        "plugins": [
            "hf",
            "synthetic",
            *first,
            *(name for name in contender.sections if name not in first),
            *("sft", "adamw", "trainer"),
        ],
        "use": {"load_processor": "synthetic", f"export_model[{export}]": "synthetic"},
        **{name: dict(section) for name, section in contender.sections.items() if section},
        "trainer": {
            "micro_batch": contender.rows,
            "max_steps": STEPS,
            "precision": "bf16",
            "save_every": None,
            "progress": "none",
        },
        "output": str(output),
    }


def make_model(shape: Mapping[str, Any], folder: Path) -> Path:
    """Random weights in bfloat16 on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(shape)
    config = AutoConfig.for_model(settings.pop("model_type"), max_position_embeddings=8192, **settings)
    with torch.device("cuda"):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    module.save_pretrained(folder)
    return folder


def measure(contender: Contender, model: Path, output: Path) -> dict[str, float]:
    """Estimated and measured, in GiB; a process of its own calls this, so that nothing is left of another run."""
    config = config_of(contender, model, output)
    synthetic = Synthetic(contender)
    plain = {key: value for key, value in config.items() if key != "use"}
    plain["plugins"] = [name for name in config["plugins"] if name != "synthetic"]
    made = estimate(plain, tokens=contender.tokens)
    gc.collect()
    torch.cuda.empty_cache()
    with suppress(Measured):
        execute(compose(config, instances={"synthetic": synthetic}))
    pairs = ("allocated", "reserved", "process")
    sizes = {name: (getattr(made, name), getattr(synthetic, name)) for name in pairs}
    return {f"{name}_{side}": sizes[name][at] / 2**30 for name in pairs for at, side in enumerate(("said", "was"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, model, output = arguments.one
        contender = next(one for one in CONTENDERS if one.name == name)
        print(json.dumps(measure(contender, Path(model), Path(output))))
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        models = {id(shape): make_model(shape, Path(folder) / str(at)) for at, shape in enumerate((QWEN, LLAMA))}
        gc.collect()
        torch.cuda.empty_cache()
        for at, contender in enumerate(CONTENDERS):
            if arguments.only and contender.name not in arguments.only:
                continue
            one = [contender.name, str(models[id(contender.shape)]), str(Path(folder) / f"run{at}")]
            done = subprocess.run(
                [sys.executable, __file__, "--one", *one], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{contender.name:40} failed: {done.stderr.strip().splitlines()[-1:]}")
                continue
            sizes = json.loads(done.stdout.strip().splitlines()[-1])
            off = sizes["allocated_said"] / sizes["allocated_was"] - 1
            shown = "  ".join(f"{name} {size:6.2f}" for name, size in sizes.items())
            print(f"{contender.name:40} {shown}  {off:+.1%}{'' if abs(off) <= SLACK else '  RED'}", flush=True)
            lines.append({"contender": contender.name, **sizes, "off": off})
    if arguments.results and lines:
        with arguments.results.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
