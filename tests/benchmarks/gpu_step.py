"""Measures a whole training step of full-size models on one GPU, beside TRL in the same run.

    python tests/benchmarks/gpu_step.py [CASE ...] [--contenders NAME ...] [--results CSV]

Models have the published shapes and random bf16 weights, made on the GPU; rows are random tokens of one length, all of
them trained. Every contender is a process of its own. It takes twelve steps and waits for the device after each; the
median of the last eight counts. LoRA has rank 16. TRL runs as its users run it: gradient checkpointing, Liger kernels
and the fastest attention that is installed. Losses of a case must agree: both begin at the same weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

STEPS, TIMED, RANK = 12, 8, 16
SAME_LOSS = 0.05
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Case:
    """One model, its adapters, and the rows of a step."""

    config: str
    fields: Mapping[str, Any]
    lora: Mapping[str, Any]
    rows: int
    length: int
    ours: Mapping[str, Mapping[str, Any]]


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 0,
}
GPT_OSS_20B = {"num_local_experts": 32, "num_hidden_layers": 24, "pad_token_id": 0}
DENSE = {
    "cce": {},
    "lora-kernels": {},
    "fused": {"mlp": False, "rope": True},
    "activations": {"policy": "auto"},
}
SPARSE = {
    "gpt-oss-attention": {},
    "cce": {},
    "scattermoe": {},
    "fused": {"experts": False, "rope": True},
    "activations": {"policy": "auto"},
}
SINKS = Case("GptOssConfig", GPT_OSS_20B, {"target_modules": ATTENTION}, 1, 8192, SPARSE)
CASES = {
    "llama-8b, all linear": Case("LlamaConfig", LLAMA_8B, {"target_modules": "all-linear"}, 2, 4096, DENSE),
    "gpt-oss-20b, attention": SINKS,
    "gpt-oss-20b, attention, 16k": replace(SINKS, length=16384),
    "gpt-oss-20b, attention and experts": replace(
        SINKS, lora={"target_modules": ATTENTION, "target_parameters": EXPERTS}
    ),
}


@dataclass
class Measured:
    """What a contender found."""

    seconds: list[float] = field(default_factory=list)
    loss: float = float("nan")
    peak_bytes: int = 0
    reserved_bytes: int = 0


def made(case: Case, attention: str | None) -> Any:
    """The model with its weights on the GPU, the same for every contender."""
    import torch
    import transformers

    config = getattr(transformers, case.config)(**case.fields, dtype="bfloat16")
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, **({"attn_implementation": attention} if attention else {})
        )
    return filled(module)


def filled(module: Any) -> Any:
    """A module from the meta device with random weights: norms 1, biases 0, the rest normal."""
    import torch

    module.to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1 and "bias" not in name:
                weight.normal_(std=0.02, generator=generator)
            else:
                weight.fill_(1.0 if "norm" in name else 0.0)
    for part in module.modules():
        if type(part).__name__.endswith("RotaryEmbedding"):
            part.__init__(part.config, device="cuda")  # Its frequencies are buffers that no checkpoint has.
    return module


def rows_of(case: Case) -> list[list[int]]:
    import torch

    vocabulary = case.fields.get("vocab_size", 201088)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (case.rows * STEPS, case.length), generator=generator)
    return ids.tolist()  # type: ignore[no-any-return]


def run_trl(case: Case, attention: str) -> Measured:
    """TRL's SFTTrainer with Liger kernels and gradient checkpointing."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    found = Measured()
    last = [0.0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            found.seconds.append(time.perf_counter() - last[0])
            last[0] = time.perf_counter()

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            found.loss = logs.get("loss", found.loss)

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = "{{ messages }}"
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=STEPS,
        per_device_train_batch_size=case.rows,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=True,
        max_length=case.length,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_liger_kernel=True,
        optim="adamw_torch_fused",
        learning_rate=1e-4,
    )
    trainer = SFTTrainer(
        model=made(case, attention),
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in rows_of(case)]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, **case.lora),
        callbacks=[Clock()],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return found


class Synthetic:
    """The plugin that stands for data and checkpoint: rows of one length, weights made on the GPU; measures."""

    def __init__(self, case: Case, found: Measured) -> None:
        from pegbox.hooks import hookimpl

        self.case, self.found, self.rows, self.last = case, found, rows_of(case), 0.0
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
        from pegbox.types import Example

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
        import torch
        from pegbox.events import Stepped

        if isinstance(event, Stepped):
            torch.cuda.synchronize()
            self.found.seconds.append(time.perf_counter() - self.last)
            self.found.loss, self.last = float(event.loss), time.perf_counter()


def run_pegbox(case: Case, sections: Mapping[str, Mapping[str, Any]]) -> Measured:
    """The usual plugins and those of `sections`."""
    import torch
    import transformers
    from pegbox.plan import compose
    from pegbox.run import execute

    found = Measured()
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
            "max_steps": STEPS,
            "batch": case.rows,
            "micro_batch": case.rows,
            "precision": "bf16",
            "log_every": 10_000,
            "save_every": None,
            "progress": "none",
        },
    }
    config = {
        "model": {"name": str(folder)},
        "plugins": ["hf", "synthetic", *[name for name in filled_in if name != "hf"]],
        "use": {"load_processor": "synthetic", "export_model[peft]": "synthetic"},
        **{name: section for name, section in filled_in.items() if section},
        "output": str(folder / "run"),
    }
    torch.cuda.reset_peak_memory_stats()
    execute(compose(config, instances={"synthetic": Synthetic(case, found)}))
    return found


def contenders(case: Case) -> dict[str, Callable[[], Measured]]:
    """By name: everything on, one plugin less each, nothing; TRL with each attention that fits."""
    every = dict(case.ours)
    found: dict[str, Callable[[], Measured]] = {"pegbox": lambda: run_pegbox(case, every)}
    recomputed = {**every, "activations": {"policy": "full"}}
    found["pegbox, full recompute"] = lambda: run_pegbox(case, recomputed)
    for name in every:
        fewer = {other: section for other, section in every.items() if other != name}
        found[f"pegbox without {name}"] = lambda fewer=fewer: run_pegbox(case, fewer)  # type: ignore[misc]
    sinks = case.config == "GptOssConfig"
    owner, key = ("gpt-oss-attention", "backend") if sinks else ("attention", "implementation")
    for attention in ("pegbox", "flash-attn-4"):
        chosen = {**every, owner: {key: attention}}
        found[f"pegbox, attention {attention}"] = lambda chosen=chosen: run_pegbox(case, chosen)  # type: ignore[misc]
    for attention in ("flash_attention_4", *(() if sinks else ("sdpa",))):
        found[f"trl + liger + {attention}"] = lambda attention=attention: run_trl(case, attention)  # type: ignore[misc]
    return found


def child(case: str, contender: str) -> None:
    import torch

    found = contenders(CASES[case])[contender]()
    found.peak_bytes, found.reserved_bytes = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    print(json.dumps(vars(found)))


def line(case: str, contender: str) -> dict[str, str]:
    """The figures of one contender, measured in a process of its own."""
    command = [sys.executable, __file__, case, "--contenders", contender, "--child"]
    done = subprocess.run(command, capture_output=True, text=True)
    row = {"case": case, "contender": contender}
    if done.returncode:
        return {**row, "status": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    found = Measured(**json.loads(done.stdout.splitlines()[-1]))
    seconds = statistics.median(found.seconds[-TIMED:])
    return {
        **row,
        "status": "ok",
        "tokens_per_s": f"{CASES[case].rows * CASES[case].length / seconds:.0f}",
        "step_ms": f"{1e3 * seconds:.1f}",
        "peak_bytes": str(found.peak_bytes),
        "reserved_bytes": str(found.reserved_bytes),
        "last_loss": f"{found.loss:.4f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"some of: {'; '.join(CASES)}")
    parser.add_argument("--contenders", nargs="*", help="their names; all without it")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.cases[0], options.contenders[0])
        return
    import torch

    where = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": options.commit or subprocess.getoutput("git describe --always --dirty"),
        "date": datetime.now(UTC).date().isoformat(),
    }
    lines: list[dict[str, str]] = []
    for case in options.cases or CASES:
        losses: dict[str, float] = {}
        for contender in options.contenders or contenders(CASES[case]):
            began = time.perf_counter()
            lines.append({**line(case, contender), **where})
            print("  ".join(list(lines[-1].values())[:7]), f"  ({time.perf_counter() - began:.0f} s)", flush=True)
            if lines[-1]["status"] == "ok":
                losses[contender] = float(lines[-1]["last_loss"])
            if options.results:
                with options.results.open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(max(lines, key=len)))
                    writer.writeheader()
                    writer.writerows(lines)
        if losses and max(losses.values()) - min(losses.values()) > SAME_LOSS:
            raise SystemExit(f"{case}: contenders do not train the same: {losses}")


if __name__ == "__main__":
    main()
