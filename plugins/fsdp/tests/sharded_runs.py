"""Tiny runs with and without sharding: their configs, how they are run, and what is kept of them.

Every step takes 8 rows over all processes, so a run is the same on any number of them.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from pegbox.assembly import model_request
from pegbox.hooks import hookimpl
from pegbox.rows import Examples
from pegbox.testing.tiny import PAD, TinyExamples, tiny_batches, tiny_model
from pegbox.types import ModulePatch, Processor
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
STEPS, HALF = 12, 6
LORA = {"r": 4, "alpha": 8}


def save_base(folder: Path, **changes: Any) -> None:
    """The model that runs start from: a random Llama of 2 layers, with embeddings that no number of shards divides."""
    tiny_model(**{"vocab_size": 263, **changes}).module.save_pretrained(folder)


class Rows:
    """Owns the data; observes losses, and what the process holds and calls."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.facts: dict[str, Any] = {}
        self.calls: dict[str, int] = {}

    @hookimpl
    def load_processor(self) -> Processor:
        words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
        return Processor(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), pad_id=PAD, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples:
        source = random.Random(split)
        letters = [chr(number) for number in range(1, 120)]
        count = 40 if split == "train" else 5
        texts = ["".join(source.choices(letters, k=source.randint(3, 20))) for _ in range(count)]
        return TinyExamples(texts, split)  # type: ignore[return-value, arg-type]

    @hookimpl
    def on_event(self, ctx: Any, event: Any) -> None:
        kind = type(event).__name__
        if kind == "RunStarted":
            module = event.job.model.module
            whole = sum(p.numel() for p in module.parameters())
            mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())
            self.facts |= {"whole": whole, "mine": mine, "placement": event.job.model.placement.name}
            self.facts["buffers"] = {name: buffer.tolist() for name, buffer in module.named_buffers()}
        if kind == "Stepped":
            self.losses.append(float(event.loss))


class Counting:
    """Patches the MLPs, and counts what runs in which form: the proof that patch, adapter, recompute and shards act."""

    def __init__(self) -> None:
        self.mlp = self.layer = self.gathered = self.adapters = 0

    @hookimpl
    def patch_modules(self, stage: str) -> list[ModulePatch]:
        if stage == "base":
            return [ModulePatch(slot="mlp", target="model.layers.*.mlp", replace=self._mlp, reason="counting")]
        if stage == "adapted":
            return [ModulePatch(slot="layer", target="model.layers.*", replace=self._layer, reason="counting")]
        return []

    def _mlp(self, module: nn.Module) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.mlp += module.training
            # Inside of a layer its weights are whole and plain, whether it runs or is computed again.
            self.gathered += not any(isinstance(p, DTensor) for p in module.parameters()) and module.training
            self.adapters += any("lora_A" in name for name, _ in module.named_parameters()) and module.training
            return original(*args, **kwargs)

        return forward

    def _layer(self, module: nn.Module) -> Any:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.layer += module.training
            return original(*args, **kwargs)

        return forward


class Second:
    """Opens a frozen second model and compares its log-probabilities with those of the untrained policy."""

    def __init__(self) -> None:
        self.difference, self.trained = -1.0, -1

    @hookimpl
    def on_event(self, ctx: Any, event: Any) -> None:
        if type(event).__name__ == "RunStarted":
            second = ctx.open_model("reference", model_request(ctx))
            batch, needs = tiny_batches(1)[0], frozenset({"logps"})
            with torch.no_grad():
                both = [model.forward(batch, needs).logps_N for model in (second, event.job.model)]
            self.difference = float((both[0] - both[1]).abs().max())
            self.trained = sum(p.requires_grad for p in second.module.parameters())


def config(base: Path, output: Path, *plugins: str, sharded: bool = True, **sections: Any) -> dict[str, Any]:
    """A config: further plugins in the order of hooks, `trainer` and other sections, keys of the core."""
    trainer = {"max_steps": STEPS, "batch": 8, "micro_batch": 2, "log_every": 1, "save_every": HALF, "keep": None}
    trainer |= {"eval_every": 5, "max_grad_norm": 0.5, "precision": "fp32", "progress": "none"}
    trainer |= sections.pop("trainer", {})
    last = ["trainer", "fsdp"] if sharded else ["trainer"]
    use = {"load_processor": "rows", **({"place_model": "fsdp"} if sharded else {})}
    adapter = {"lora": LORA} if "lora" in plugins else {}
    optimizer = {"adamw": {"learning_rate": 1e-2, "schedule": "constant"}} if "optim" not in plugins else {}
    fsdp = {"fsdp": sections.pop("fsdp")} if sharded and "fsdp" in sections else {}
    sections.pop("fsdp", None)
    return {
        "model": {"name": str(base)},
        "plugins": ["rows", "hf", *plugins, "sft", *(["adamw"] if optimizer else []), *last],
        "use": use,
        "output": str(output),
        "trainer": trainer,
        **adapter,
        **optimizer,
        **fsdp,
        **sections,
    }


def run(config: dict[str, Any], **instances: Any) -> Rows:
    """Run a config in this process; what was seen is also written beside the run, for each process."""
    from pegbox.plan import compose
    from pegbox.run import execute

    rows = Rows()
    execute(compose(config, instances={"rows": rows, **instances}))
    seen = {"losses": rows.losses, **rows.facts, **{name: vars(value) for name, value in instances.items()}}
    rank = os.environ.get("RANK", "0")
    (Path(config["output"]) / f"seen-{rank}.json").write_text(json.dumps(seen, default=str))
    return rows


def seen(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"seen-{rank}.json").read_text())  # type: ignore[no-any-return]


def in_subprocess(*arguments: str, timeout_s: float = 240) -> None:
    """Run Python with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"


def figures(folder: Path, kind: str, name: str) -> torch.Tensor:
    """One figure of `metrics.jsonl` over the steps."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return torch.tensor([record[name] for record in map(json.loads, lines) if record["kind"] == kind])


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """What the run exported: an adapter, or a whole model."""
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")
