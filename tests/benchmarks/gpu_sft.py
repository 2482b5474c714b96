"""Measures supervised fine-tuning on one GPU: packing, attention, recomputing, compiling, heads, quantized bases.

    python tests/benchmarks/gpu_sft.py [--results CSV] [--only NAME ...]

Every contender trains the same model (the architecture of Qwen3-0.6B, random weights) in bf16 on the same rows, whose
lengths are spread as those of conversations are: lognormal, median 300, sigma 0.9, at most 4,096 tokens. It passes over
them twice; the second pass is timed, in tokens that the rows really have, and within it CUDA's synchronization debug
mode is `error`, so that an operation that makes the host wait shows. A contender whose last loss is not that of the
first of its group fails: only the same training is compared.
"""

from __future__ import annotations

import argparse
import csv
import gc
import random
import subprocess
import tempfile
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pegbox.events import Event, GradientsReady, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Example
from pegbox.run import execute
from pegbox.types import Item, Model, Processor

LENGTH, MICRO_BATCH, ROWS, ROWS_PER_STEP, BINS_PER_STEP = 4096, 4, 192, 32, 4
VOCABULARY = 151936
SAME_LOSS = 5e-3
PACKED = {"packing": {"length": LENGTH}, "trainer": {"batch": BINS_PER_STEP}}
ALONE = {"trainer": {"batch": BINS_PER_STEP, "micro_batch": 1}}
FULL = {"optim": {"learning_rate": 1e-5}}
ROW = Mapping[str, str]


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        group: contenders that train the same, and must reach the same loss; alone if it differs from all others.
        sections: of the config, for plugins that this one has besides the usual ones.
        lora: train adapters instead of all weights.
        dense: have torch's usual attention with a mask instead of that by borders of documents.
        whole_head: compute all logits at once.
    """

    name: str
    group: str
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    lora: bool = True
    dense: bool = False
    whole_head: bool = False


def merged(*parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections joined key by key."""
    names = {name for part in parts for name in part}
    return {name: {key: value for part in parts for key, value in part.get(name, {}).items()} for name in names}


def with_packing(name: str, group: str = "lora", **more: Mapping[str, Any]) -> Contender:
    return Contender(name, group, merged(PACKED, more))


CONTENDERS = (
    with_packing("lora packed"),
    Contender("lora padded", "padded lora", {"trainer": {"batch": ROWS_PER_STEP}}),
    Contender("lora packed, dense mask", "lora", PACKED, dense=True),
    with_packing("lora packed, flex attention", hf={"attention": "flex_attention"}),
    with_packing("lora packed, full recompute", activations={"policy": "full"}),
    with_packing("lora packed, 14 layers recomputed", activations={"policy": 14}),
    with_packing("lora packed, full recompute, offload", activations={"policy": "full", "offload": "cpu"}),
    with_packing("lora packed, compiled layers", compile={}),
    Contender("lora packed, micro-batch 1, chunked head", "lora", merged(PACKED, ALONE)),
    Contender("lora packed, micro-batch 1, whole head", "lora", merged(PACKED, ALONE), whole_head=True),
    with_packing("lora packed, nf4 base", "nf4", bnb={}),
    with_packing("lora packed, int8 base", "int8", bnb={"kind": "int8"}),
    Contender("full padded", "padded full", merged(FULL, {"trainer": {"batch": ROWS_PER_STEP}}), lora=False),
    Contender("full packed", "full", merged(FULL, PACKED), lora=False),
    Contender("full packed, adamw_8bit", "8 bit", merged(FULL, PACKED, {"optim": {"name": "adamw_8bit"}}), lora=False),
    Contender(
        "full packed, paged_adamw_8bit",
        "8 bit",
        merged(FULL, PACKED, {"optim": {"name": "paged_adamw_8bit"}}),
        lora=False,
    ),
    with_packing("lora packed, offload alone", activations={"policy": "none", "offload": "cpu"}),
)


class Rows:
    """Random tokens in rows of spread lengths, the first third of each not trained."""

    split, fingerprint = "train", "synthetic"

    def __init__(self) -> None:
        source = random.Random(0)
        self.lengths = [max(8, min(LENGTH, round(source.lognormvariate(5.704, 0.9)))) for _ in range(ROWS)]
        generator = torch.Generator().manual_seed(0)
        self._ids = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in self.lengths]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Example:
        ids = self._ids[index]
        prompt = len(ids) // 3
        return Example(input_ids=ids, labels=[-100] * prompt + ids[prompt:])

    def describe(self, index: int) -> str:
        return f"synthetic row {index}"


class Measured(Exception):
    """Ends a run whose numbers are known: nothing needs to be saved."""


class Synthetic:
    """Owns the data and measures: the second pass, without waiting in it."""

    def __init__(self, contender: Contender, rows: Rows, *, strict: bool) -> None:
        self._contender, self._rows, self._strict = contender, rows, strict
        self._job: Any = None
        self._start = 0.0
        self.seconds, self.loss, self.peak_bytes = 0.0, 0.0, 0

    @hookimpl
    def register_items(self) -> list[Item]:
        name = "peft" if self._contender.lora else "transformers"
        return [Item(kind="export_format", name=name, target="nothing is written")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return self._rows if split == "train" else None

    @hookimpl
    def export_model(self, request: Any) -> Path:
        return request.folder  # type: ignore[no-any-return]

    @hookimpl(wrapper=True)
    def load_model(self) -> Generator[None, Model, Model]:
        model = yield
        if self._contender.dense:
            from pegbox_hf.attention import facts_of

            facts_of(model.module).borders = False  # type: ignore[arg-type]
        return model

    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._job = event.job
        if isinstance(event, GradientsReady) and self._start and self._strict:
            torch.cuda.set_sync_debug_mode("error")
        if isinstance(event, Stepped):
            if not self._start and self._job.train.epoch >= 1:
                torch.cuda.synchronize()
                self._start = time.perf_counter()
            if event.step == self._job.train.total_steps:
                torch.cuda.set_sync_debug_mode("default")
                torch.cuda.synchronize()
                self.seconds = time.perf_counter() - self._start
                self.loss, self.peak_bytes = float(event.loss), torch.cuda.max_memory_allocated()
                raise Measured


def save_model(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=2 * LENGTH,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def config_of(contender: Contender, model: Path, output: Path) -> dict[str, Any]:
    usual = {
        "hf": {},
        "sft": {},
        "optim": {"learning_rate": 1e-4},
        "trainer": {
            "epochs": 2,
            "micro_batch": MICRO_BATCH,
            "precision": "bf16",
            "log_every": 10_000,
            "save_every": None,
            "progress": "none",
        },
        **({"lora": {"r": 16, "alpha": 32, "targets": "all-linear"}} if contender.lora else {}),
        **({} if contender.whole_head else {"chunked-cross-entropy": {}}),
        **({"bnb-optim": {}} if "8bit" in str(contender.sections.get("optim")) else {}),
    }
    sections = merged(usual, contender.sections)
    format_owner = {f"export_model[{'peft' if contender.lora else 'transformers'}]": "synthetic"}
    first = [name for name in ("hf", "synthetic", "packing", "bnb") if name in sections or name == "synthetic"]
    filled = {name: section for name, section in sections.items() if section}
    return {
        "model": {"name": str(model)},
        "plugins": [*first, *sorted(sections.keys() - set(first))],
        "use": {"load_processor": "synthetic", **format_owner},
        **filled,
        "output": str(output),
    }


def measure(contender: Contender, model: Path, output: Path, *, strict: bool) -> Synthetic:
    """Run it; with `strict`, an operation in the second pass that makes the host wait raises RuntimeError."""
    synthetic = Synthetic(contender, Rows(), strict=strict)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        execute(compose(config_of(contender, model, output), instances={"synthetic": synthetic}))
    except Measured:
        pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return synthetic


def line(contender: Contender, folder: Path, number: int, losses: dict[str, float]) -> ROW:
    waits = "no"
    try:
        found = measure(contender, folder / "model", folder / f"run-{number}", strict=True)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        waits = "yes"
        found = measure(contender, folder / "model", folder / f"run-{number}-again", strict=False)
    expected = losses.setdefault(contender.group, found.loss)
    if abs(found.loss - expected) > SAME_LOSS:
        raise AssertionError(f"{contender.name} ends with loss {found.loss}, others of its group with {expected}")
    return {
        "contender": contender.name,
        "tokens_per_s": f"{sum(Rows().lengths) / found.seconds:.0f}",
        "peak_bytes": str(found.peak_bytes),
        "last_loss": f"{found.loss:.5f}",
        "host_waits": waits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", nargs="*", help="parts of names of contenders")
    options = parser.parse_args()
    commit = options.commit or subprocess.getoutput("git describe --always --dirty")
    where = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
    }
    losses: dict[str, float] = {}
    lines: list[ROW] = []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "model")
        for number, contender in enumerate(CONTENDERS):
            if options.only and not any(part in contender.name for part in options.only):
                continue
            began = time.perf_counter()
            try:
                lines.append({**line(contender, Path(folder), number, losses), **where})
            except Exception as error:
                failures.append(contender.name)
                print(f"{contender.name}: {type(error).__name__}: {error}", flush=True)
                continue
            print("  ".join(lines[-1].values()), f"  ({time.perf_counter() - began:.0f} s)", flush=True)
            if options.results:
                with options.results.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(lines[0]))
                    writer.writeheader()
                    writer.writerows(lines)
    if failures:
        raise SystemExit(f"failed: {', '.join(failures)}")


if __name__ == "__main__":
    main()
