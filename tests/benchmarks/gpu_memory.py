"""Measures on one GPU what `pegbox memory` estimates: allocated, reserved and the whole process, beside each other.

    python tests/benchmarks/gpu_memory.py [--results CSV] [--only NAME ...] [--tiny]

Each contender trains a model with random weights (the architecture of Qwen3-0.6B, Llama-8B or gpt-oss-20b) for some
steps on rows of one length, every token trained. The estimate is made first, in the same process, on the same config.
`allocated` is compared with torch's `max_memory_allocated`, `reserved` with `max_memory_reserved`, and `process` with
what the driver says this process has (all memory in use, less what was in use before it began). A line is red if the
first is off by more than 10 %. What a contender writes goes to a log beside the results. `--tiny` has two small layers
and short rows, so that everything can be tried on whatever device is there; a CPU's memory is not measured.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import subprocess
import tempfile
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from children import Failed, answer
from packed_checkpoint import write_packed
from pegbox.events import Event, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Example
from pegbox.run import execute
from pegbox.types import Item, Model, ModelOptions, Processor
from pegbox_memory.estimate import estimate
from step_cases import filled
from step_watch import device

STEPS, SLACK, GIB = 6, 0.1, 1 << 30
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
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 32, "num_hidden_layers": 24, "pad_token_id": 0}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024, "head_dim": 32}
TINY_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Contender:
    """One line: which model, rows of which length, and the sections of its plugins."""

    name: str
    shape: Mapping[str, Any]
    rows: int
    tokens: int
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


LORA = {"lora": {"r": 16, "alpha": 32, "targets": "all-linear"}}
ATTENTION_LORA = {"lora": {"r": 16, "alpha": 32, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}}
CHUNKED: dict[str, dict[str, Any]] = {"chunked-cross-entropy": {}}
FULL_RECOMPUTE: dict[str, dict[str, Any]] = {"activations": {"policy": "full"}}
PACKED: dict[str, dict[str, Any]] = {"mxfp4": {}} | FULL_RECOMPUTE
KERNELS: dict[str, dict[str, Any]] = {"gpt-oss-attention": {}, "cce": {}, "scattermoe": {}}
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
    Contender("gpt-oss-20b lora, mxfp4", GPT_OSS, 1, 2048, ATTENTION_LORA | CHUNKED | PACKED),
    Contender("gpt-oss-20b lora, mxfp4, kernels", GPT_OSS, 1, 2048, ATTENTION_LORA | KERNELS | PACKED),
)


def shrunk(contender: Contender) -> Contender:
    """The same with two small layers and short rows; without a GPU it is said how much memory there is."""
    sections = {name: dict(section) for name, section in contender.sections.items()}
    if "packing" in sections:
        sections["packing"]["length"] = 128
    if device() == "cpu" and sections.get("activations", {}).get("policy") == "auto":
        sections["activations"]["memory_gib"] = 1.0
    return replace(contender, shape={**contender.shape, **TINY, **TINY_HEADS}, tokens=128, sections=sections)


class Rows:
    """Rows of one length, every token trained."""

    split, fingerprint = "train", "rows of one length"

    def __init__(self, count: int, length: int) -> None:
        self._count, self._ids = count, [1 + at % 1000 for at in range(length)]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        return Example(input_ids=self._ids, labels=self._ids)

    def describe(self, index: int) -> str:
        return f"row {index}"


class Measured(Exception):
    """Ends a run whose numbers are known."""


class Synthetic:
    """Owns the data and random weights made on the device, and reads the allocator after the last step."""

    def __init__(self, contender: Contender) -> None:
        half = 2 if "packing" in contender.sections else 1
        self._rows = Rows(STEPS * contender.rows * half, contender.tokens // half)
        self._export = "peft" if "lora" in contender.sections else "transformers"
        self._stored = stored(contender)
        self._before = used_bytes()
        self.allocated = self.reserved = self.process = 0

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="export_format", name=self._export, target="nothing is written")]

    @hookimpl
    def configure_model(self) -> ModelOptions:
        return ModelOptions() if self._stored else ModelOptions(empty=True)

    @hookimpl(wrapper=True)
    def load_model(self) -> Generator[None, Model, Model]:
        model = yield
        if not self._stored:
            filled(model.module)  # type: ignore[arg-type]
        return model

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
        if isinstance(event, RunStarted) and device() == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif isinstance(event, Stepped) and event.step == STEPS:
            if device() == "cuda":
                torch.cuda.synchronize()
                self.allocated, self.reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                self.process = used_bytes() - self._before
            raise Measured


def used_bytes() -> int:
    """Memory of the GPU in use by anyone, asked of the driver without making a context here."""
    if device() == "cpu":
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) << 20


def config_of(contender: Contender, model: Path, output: Path) -> dict[str, Any]:
    """The config of a run."""
    export = "peft" if "lora" in contender.sections else "transformers"
    first = [name for name in ("packing", "bnb", "mxfp4") if name in contender.sections]
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


def stored(contender: Contender) -> bool:
    """Whether its weights must lie on disk: who quantizes reads them there."""
    return bool({"bnb", "mxfp4"} & contender.sections.keys())


def make_model(contender: Contender, folder: Path) -> None:
    """The model's config on disk, with random bfloat16 weights beside it if they are read there."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(contender.shape)
    if "mxfp4" in contender.sections:
        del settings["model_type"]
        write_packed(settings, folder)
        return
    config = AutoConfig.for_model(settings.pop("model_type"), max_position_embeddings=8192, **settings)
    if not stored(contender):
        config.architectures, config.dtype = [type(config).__name__.replace("Config", "ForCausalLM")], "bfloat16"
        config.save_pretrained(folder)
        return
    with torch.device(device()):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(contender: Contender, folder: Path) -> dict[str, float]:
    """Estimated and measured, in GiB; a process of its own calls this, so that nothing is left of another run."""
    synthetic = Synthetic(contender)
    make_model(contender, folder / "model")
    config = config_of(contender, folder / "model", folder / "run")
    plain = {key: value for key, value in config.items() if key != "use"}
    plain["plugins"] = [name for name in config["plugins"] if name != "synthetic"]
    made = estimate(plain, tokens=contender.tokens)
    gc.collect()
    if device() == "cuda":
        torch.cuda.empty_cache()
    with suppress(Measured):
        execute(compose(config, instances={"synthetic": synthetic}))
    pairs = ("allocated", "reserved", "process")
    sizes = {name: (getattr(made, name), getattr(synthetic, name)) for name in pairs}
    return {f"{name}_{side}": sizes[name][at] / GIB for name in pairs for at, side in enumerate(("said", "was"))}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--results", type=Path, help="a CSV file; what contenders write goes beside it")
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--tiny", action="store_true", help="two small layers, on whatever device is there")
    parser.add_argument("--limit", type=float, default=120, help="seconds that a contender may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if device() == "cpu" and not options.tiny:
        parser.error("there is no GPU; with --tiny everything is tried on a CPU")
    return options


def main() -> None:
    options = parsed()
    chosen = {contender.name: shrunk(contender) if options.tiny else contender for contender in CONTENDERS}
    if options.one:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(measure(chosen[options.one], Path(folder))))
        return
    log = options.results.with_suffix(".log") if options.results else Path(tempfile.mkdtemp()) / "gpu_memory.log"
    lines, failed = [], 0
    for name in options.only:
        try:
            sizes = answer(__file__, ["--one", name, *["--tiny"] * options.tiny], name, log, options.limit)
        except Failed as why:
            failed += 1
            print(f"{name:40} failed: {why}", flush=True)
            continue
        off = sizes["allocated_said"] / sizes["allocated_was"] - 1 if sizes["allocated_was"] else float("nan")
        shown = "  ".join(f"{what} {size:6.2f}" for what, size in sizes.items())
        print(f"{name:40} {shown}  {off:+.1%}{'  RED' if abs(off) > SLACK else ''}", flush=True)
        lines.append({"contender": name, **sizes, "off": off})
        if options.results:
            with options.results.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(lines[0]))
                writer.writeheader()
                writer.writerows(lines)
    if failed:
        raise SystemExit(f"{failed} failed; what they wrote is in {log}")


if __name__ == "__main__":
    main()
