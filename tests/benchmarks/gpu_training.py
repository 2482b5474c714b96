"""Measures LoRA training on one GPU beside transformers' Trainer, and proves that the loop never waits for the device.

    python tests/benchmarks/gpu_training.py [--results CSV]

Both sides train the same model (the architecture of SmolLM2-135M, random weights) on the same rows with the same
adapters, optimizer and batch shapes, in bf16 autocast over a bf16 base. Between two logged steps of ours, CUDA's
synchronization debug mode is set to `error`: an operation that makes the host wait stops the run.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from pegbox.events import Event, GradientsReady, Logged, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Example, Examples
from pegbox.run import execute
from pegbox.types import Item, Processor

LENGTH, MICRO_BATCH, ACCUMULATION, STEPS, WARM, LOG_EVERY = 1024, 8, 2, 60, 20, 10
VOCABULARY = 49152


class Rows:
    """Random tokens, the second half of each row trained."""

    split, fingerprint = "train", "synthetic"

    def __init__(self, rows: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        ids = self.ids[index].tolist()
        return Example(input_ids=ids, labels=[-100] * (LENGTH // 2) + ids[LENGTH // 2 :])

    def describe(self, index: int) -> str:
        return f"synthetic row {index}"


class Synthetic:
    """Owns the data; forbids waiting for the device between logged steps; keeps the time of each logged step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @hookimpl
    def register_items(self) -> list[Item]:
        return [Item(kind="export_format", name="peft", target="nothing is written")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        return Rows(STEPS * MICRO_BATCH * ACCUMULATION) if split == "train" else None  # type: ignore[return-value]

    @hookimpl
    def export_model(self, request: object) -> Path:
        return request.folder  # type: ignore[attr-defined, no-any-return]

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, GradientsReady) and event.step >= WARM:
            torch.cuda.set_sync_debug_mode("error")
        if isinstance(event, Stepped) and event.step % LOG_EVERY == 0:
            torch.cuda.set_sync_debug_mode("default")
        if isinstance(event, Logged) and event.step >= WARM:
            torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def save_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def ours(folder: Path) -> Callable[[], list[float]]:
    def run() -> list[float]:
        synthetic = Synthetic()
        config = {
            "model": {"name": str(folder)},
            "plugins": ["synthetic", "hf", "lora", "sft", "adamw", "trainer"],
            "use": {"load_processor": "synthetic", "export_model[peft]": "synthetic"},
            "lora": {"r": 16, "alpha": 32, "targets": "all-linear"},
            "adamw": {"learning_rate": 1e-4},
            "trainer": {
                "max_steps": STEPS,
                "micro_batch": MICRO_BATCH,
                "accumulation": ACCUMULATION,
                "precision": "bf16",
                "log_every": LOG_EVERY,
                "shuffle": False,
            },
            "output": str(folder / "run"),
        }
        execute(compose(config, instances={"synthetic": synthetic}))
        return synthetic.times

    return run


def transformers_trainer(folder: Path) -> Callable[[], list[float]]:
    def run() -> list[float]:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

        times: list[float] = []

        class Clock(TrainerCallback):
            def on_log(self, args: object, state: object, control: object, **_: object) -> None:
                torch.cuda.synchronize()
                if state.global_step >= WARM and state.global_step % LOG_EVERY == 0:  # type: ignore[attr-defined]
                    times.append(time.perf_counter())

        rows = Rows(STEPS * MICRO_BATCH * ACCUMULATION)
        data = [{"input_ids": row.input_ids, "labels": row.labels} for row in map(rows.__getitem__, range(len(rows)))]
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda()
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            learning_rate=1e-4,
            bf16=True,
            logging_steps=LOG_EVERY,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
        return sorted(set(times))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder))
        for name, run in (("pegbox", ours(Path(folder))), ("transformers Trainer", transformers_trainer(Path(folder)))):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            times = run()
            pace = [(b - a) / LOG_EVERY for a, b in pairwise(times)]
            step_s = statistics.median(pace)
            tokens_per_s = LENGTH * MICRO_BATCH * ACCUMULATION / step_s
            rows.append([name, f"{step_s * 1e3:.1f}", f"{tokens_per_s:.0f}", str(torch.cuda.max_memory_allocated())])
    commit = options.commit or subprocess.getoutput("git describe --always --dirty")
    where = [torch.cuda.get_device_name(), torch.__version__, commit, datetime.now(UTC).date().isoformat()]
    head = ["contender", "step_ms", "tokens_per_s", "peak_bytes", "gpu", "torch", "commit", "date"]
    for row in [head, *([*row, *where] for row in rows)]:
        print("  ".join(row))
    if options.results:
        with options.results.open("w", newline="") as file:
            csv.writer(file).writerows([head, *([*row, *where] for row in rows)])


if __name__ == "__main__":
    main()
