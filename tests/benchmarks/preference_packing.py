"""Preferences in full bins beside padded ones: DPO with a LoRA adapter, and TRL's DPOTrainer in the same run.

    python tests/benchmarks/preference_packing.py [--device cpu|cuda] [--contenders NAME ...] [--write CSV]

Lengths are synthetic: prompts and answers are lognormal with medians of 60 and 100 tokens, the spread (sigma 0.9) of
the other benchmarks' conversations, and at most 1,024 tokens together, which is where TRL cuts rows by default. On a
CPU all lengths are a quarter of that and the model is small. Tokens and weights are random and the same for all;
adapters begin at the same numbers, with B other than zero, so that policy and reference differ from the first step on.
Every step takes the same pairs, so that losses can be compared; the median of the steps after the first `WARM_UP`
counts, in tokens that the pairs really have.

`packed` and `padded` are the same run with and without the plugin `packing`. A padded micro-batch has 8 pairs, TRL's
default, which the trainer chose by length among those of the step: so much padding is gone before anything is packed.
A packed one is a bin, which on a GPU takes no more memory. `trl` has micro-batches of 8 in the order of the data. No
contender recomputes activations. On a GPU ours have the plugins `attention`, `cce` and `lora-kernels`, and TRL torch's
attention; on a CPU all have torch's. `padding` is the share of computed tokens that no pair has.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pegbox.hooks import hookimpl
from preference_cases import SETTINGS, Pair, Setting, fill_adapters, pairs_of

WARM_UP, TIMED = 2, 4
STEPS = WARM_UP + TIMED
RANK, BETA, LEARNING_RATE = 16, 0.1, 1e-4
LEAST_SPEED_UP = 1.5
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Watch:
    """Reads the clock after each step, counts what goes through the embedding, keeps losses.

    Attributes:
        computed: tokens of a step that were computed, padding among them; policy and reference each count.
    """

    device: str
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    computed: int = 0
    peak_bytes: int = 0
    last: float = 0.0

    def begins(self, module: Any) -> None:
        """Adapters get their numbers, and the clock starts."""
        fill_adapters(module)
        module.get_input_embeddings().register_forward_hook(self._count)
        self.last = self.clock()

    def _count(self, _: Any, given: tuple[torch.Tensor, ...], __: Any) -> None:
        if len(self.seconds) >= WARM_UP:
            self.computed += given[0].numel()

    def stepped(self) -> None:
        """A step was made, or is on its way."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = self.clock()
        self.seconds.append(now - self.last)
        if len(self.seconds) == WARM_UP and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if len(self.seconds) == STEPS and self.device == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated()
        self.last = self.clock()


class Rows:
    """Pairs as rows of the training split (`pegbox.rows.Examples`)."""

    split, fingerprint = "train", "synthetic"

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        from pegbox.rows import Example

        pair = self.pairs[index]
        untrained = [-100] * len(pair.prompt)
        return Example(
            input_ids=[*pair.prompt, *pair.chosen, *pair.prompt, *pair.rejected],
            labels=[*untrained, *pair.chosen, *untrained, *pair.rejected],
            documents=(len(pair.prompt) + len(pair.chosen), len(pair.prompt) + len(pair.rejected)),
            signs=(1, -1),
        )

    def describe(self, index: int) -> str:
        return f"synthetic pair {index}"


class Measured(Exception):
    """Ends a run before its export: all is known."""


class Synthetic:
    """The plugin that stands for data and tokenizer, and measures."""

    def __init__(self, pairs: Sequence[Pair], watch: Watch) -> None:
        self._pairs, self._watch = pairs, watch

    @hookimpl
    def register_items(self) -> Any:
        from pegbox.types import Item

        return [Item(kind="export_format", name="peft", target="nothing is written")]

    @hookimpl
    def load_processor(self) -> Any:
        from pegbox.types import Processor

        return Processor(tokenizer=None, pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return Rows(self._pairs) if split == "train" else None

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]

    @hookimpl
    def on_event(self, event: Any) -> None:
        from pegbox.events import RunStarted, Stepped

        if isinstance(event, RunStarted):
            self._watch.begins(event.job.model.module)
        elif isinstance(event, Stepped):
            self._watch.stepped()
            self._watch.losses.append(float(event.loss))
            if event.step == STEPS:
                raise Measured


def run_pegbox(setting: Setting, packed: bool, model: Path, pairs: Sequence[Pair], watch: Watch) -> None:
    """The same run with and without packing; a step takes all pairs, so it is an epoch."""
    from pegbox.plan import compose
    from pegbox.run import execute

    packing: Mapping[str, Mapping[str, Any]] = {"packing": {"length": setting.length}} if packed else {}
    sections: dict[str, Mapping[str, Any]] = {
        "hf": {},
        "synthetic": {},
        **packing,
        **setting.ours,
        "lora": {"r": RANK, "alpha": 2 * RANK, "targets": "all-linear"},
        "reference": {"how": "adapter"},
        "dpo": {"beta": BETA},
        "adamw": {"learning_rate": LEARNING_RATE, "schedule": "constant", "weight_decay": 0.0},
        "trainer": {
            "max_steps": STEPS,
            "batch": len(pairs),
            "micro_batch": setting.bins if packed else setting.micro_batch,
            "precision": setting.precision,
            "shuffle": False,
            "max_grad_norm": 1.0,
            "log_every": 10_000,
            "save_every": None,
            "progress": "none",
            "device": "cpu" if watch.device == "cpu" else "auto",
        },
    }
    with tempfile.TemporaryDirectory() as folder, suppress(Measured):
        config = {
            "model": {"name": str(model), "dtype": setting.dtype},
            "plugins": list(sections),
            "use": {"load_processor": "synthetic", "export_model[peft]": "synthetic"},
            **{name: section for name, section in sections.items() if section},
            "output": str(Path(folder) / "run"),
        }
        execute(compose(config, instances={"synthetic": Synthetic(pairs, watch)}))


def run_trl(setting: Setting, model: Path, pairs: Sequence[Pair], watch: Watch) -> None:
    """TRL's DPOTrainer; the reference is the policy without its adapter there too."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stepped()

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            if "loss" in logs:
                watch.losses.append(float(logs["loss"]))

    class Tokenized(DPOTrainer):  # type: ignore[misc]
        """Rows are token ids already."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    rows = [{"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected} for pair in pairs]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Tokenized(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, setting.dtype)),
            args=DPOConfig(
                output_dir=folder,
                max_steps=STEPS,
                per_device_train_batch_size=setting.micro_batch,
                gradient_accumulation_steps=len(pairs) // setting.micro_batch,
                gradient_checkpointing=False,
                bf16=setting.precision == "bf16",
                use_cpu=watch.device == "cpu",
                max_length=None,
                beta=BETA,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                logging_steps=1,
                train_sampling_strategy="sequential",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **names),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        watch.begins(trainer.model)
        trainer.train()


def save_model(setting: Setting, folder: Path, device: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**setting.model, pad_token_id=0, dtype=setting.dtype)
    with torch.device(device):
        LlamaForCausalLM(config).to(getattr(torch, setting.dtype)).save_pretrained(folder)


def measure(name: str, setting: Setting, model: Path, pairs: Sequence[Pair], watch: Watch) -> Watch:
    """One contender, in this process: nothing of the one before is on the GPU."""
    gc.collect()
    if watch.device == "cuda":
        torch.cuda.empty_cache()
    if name == "trl":
        run_trl(setting, model, pairs, watch)
    else:
        run_pegbox(setting, name == "packed", model, pairs, watch)
    return watch


def line(name: str, setting: Setting, watch: Watch, pairs: Sequence[Pair]) -> dict[str, str]:
    tokens = sum(pair.tokens for pair in pairs)
    seconds = statistics.median(watch.seconds[WARM_UP:])
    return {
        "contender": name,
        "bin_tokens": str(setting.length),
        "pairs": str(len(pairs)),
        "tokens": str(tokens),
        "tokens_per_s": f"{tokens / seconds:.0f}",
        "step_ms": f"{1e3 * seconds:.1f}",
        "padding": f"{1 - 2 * TIMED * tokens / watch.computed:.3f}",
        "peak_bytes": str(watch.peak_bytes),
        "first_loss": f"{watch.losses[0]:.5f}",
        "last_loss": f"{watch.losses[STEPS - 1]:.5f}",
    }


def where(device: str, clock: str, commit: str) -> dict[str, str]:
    import transformers

    return {
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} cpu",
        "clock": clock,
        "threads": str(torch.get_num_threads()) if device == "cpu" else "",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or subprocess.getoutput("git describe --always --dirty"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def verdict(setting: Setting, found: Mapping[str, Watch]) -> list[str]:
    """What does not hold: the same losses at every step, and the bound."""
    wrong = []
    first, *others = found
    for other in others:
        gap = max(abs(a - b) for a, b in zip(found[first].losses[:STEPS], found[other].losses[:STEPS], strict=True))
        print(f"losses of {first} and {other} are at most {gap:.1e} apart")
        if gap > setting.same_loss:
            wrong.append(f"losses of {first} and {other} are {gap:.1e} apart (bound {setting.same_loss:.0e})")
    if {"packed", "padded"} <= found.keys():
        packed, *slower = (statistics.median(found[name].seconds[WARM_UP:]) for name in found)
        for name, seconds in zip([name for name in found if name != "packed"], slower, strict=True):
            print(f"packed is {seconds / packed:.2f} x as fast as {name}")
        if slower[0] / packed < LEAST_SPEED_UP:
            wrong.append(f"packed is {slower[0] / packed:.2f} x as fast as padded (bound {LEAST_SPEED_UP} x)")
    return wrong


def main() -> None:
    names = ["packed", "padded", *(["trl"] if importlib.util.find_spec("trl") else [])]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SETTINGS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process, on a busy machine")
    parser.add_argument("--contenders", nargs="*", default=names, choices=names)
    parser.add_argument("--write", type=Path, metavar="CSV", help="write the table there")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    setting = SETTINGS[options.device]
    pairs = pairs_of(setting)
    found: dict[str, Watch] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(setting, Path(folder), options.device)
        for name in sorted(options.contenders, key=names.index):
            began = time.perf_counter()
            found[name] = measure(name, setting, Path(folder), pairs, Watch(options.device, CLOCKS[options.clock]))
            print(f"{name}: {time.perf_counter() - began:.0f} s in all", flush=True)
    lines = [
        {**line(name, setting, watch, pairs), **where(options.device, options.clock, options.commit)}
        for name, watch in found.items()
    ]
    if options.write:
        with options.write.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
    wrong = verdict(setting, found)
    shown = list(line("", setting, next(iter(found.values())), pairs))
    print("  ".join(f"{name:>12}" for name in shown))
    for row in lines:
        print("  ".join(f"{row[name]:>12}" for name in shown))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
