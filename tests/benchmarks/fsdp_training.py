"""Measures sharded training (plugin fsdp) on two GPUs beside one GPU, DDP, plain torch FSDP2 and transformers' Trainer.

    python tests/benchmarks/fsdp_training.py [--results CSV] [--only NAME ...]

Every contender trains the same model (a Llama of 1.1 billion parameters, random weights) on the same rows, 32 of 2048
tokens in a step, in bf16 arithmetic: the whole of it with float32 weights, or an adapter on bf16 weights. Each starts
anew. Between two logged steps of the sharded runs CUDA's synchronization debug mode is `error`: an operation that makes
the host wait stops the run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

LENGTH, MICRO_BATCH, ROWS_PER_STEP, STEPS, WARM, LOG_EVERY = 2048, 4, 32, 30, 10, 5
VOCABULARY, RATE = 32000, 1e-4
LORA = {"r": 16, "alpha": 32}
HEAD = ["contender", "trains", "processes", "step_ms", "tokens_per_s", "peak_bytes", "start_peak_bytes"]
HEAD += ["host_peak_bytes", "losses_at_10_20_30", "note"]


class Enough(Exception):
    """The run has been measured: neither a checkpoint nor an export is needed."""


class Rows:
    """Random tokens, all trained."""

    split, fingerprint = "train", "synthetic"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCABULARY, (STEPS * ROWS_PER_STEP, LENGTH), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Any:
        from pegbox.rows import Example

        ids = self.ids[index].tolist()
        return Example(input_ids=ids, labels=ids)

    def describe(self, index: int) -> str:
        return f"synthetic row {index}"


class Clock:
    """Times and losses of logged steps, and the memory of this process."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.losses: list[float] = []
        self.note = ""
        self.start_peak = 0

    def start(self) -> None:
        self.start_peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def logged(self, step: int, loss: float) -> None:
        torch.cuda.synchronize()
        if step >= WARM:
            self.times.append(time.perf_counter())
        if step % 10 == 0:
            self.losses.append(loss)

    def row(self) -> dict[str, object]:
        return {
            "step_ms": 1e3 * statistics.median((b - a) / LOG_EVERY for a, b in pairwise(self.times)),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "start_peak_bytes": self.start_peak,
            "host_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "losses": self.losses,
            "note": self.note,
        }


def pegbox(
    folder: Path, clock: Clock, trains: str, *, plugins: tuple[str, ...] = (), strict: bool, **more: Any
) -> None:
    from pegbox.events import Event, GradientsReady, Logged, RunStarted, Stepped
    from pegbox.hooks import hookimpl
    from pegbox.plan import compose
    from pegbox.run import execute
    from pegbox.types import Processor

    save = more.pop("save", False)

    class Synthetic:
        """Owns the data; forbids waiting for the device between logged steps."""

        @hookimpl
        def load_processor(self) -> Processor:
            return Processor(tokenizer=Silent(), pad_id=0, fingerprint="synthetic")  # type: ignore[arg-type]

        @hookimpl
        def build_dataset(self, split: str) -> Any:
            return Rows() if split == "train" else None

        @hookimpl
        def on_event(self, event: Event) -> None:
            if isinstance(event, RunStarted):
                clock.start()
            if strict and isinstance(event, GradientsReady) and event.step >= WARM:
                torch.cuda.set_sync_debug_mode("error")
            if isinstance(event, Stepped) and event.step % LOG_EVERY == 0:
                torch.cuda.set_sync_debug_mode("default")
            if isinstance(event, Logged):
                clock.logged(event.step, event.metrics["loss"])
                if event.step == STEPS and not save:
                    raise Enough

    adapter = ["lora"] if trains == "adapter" else []
    config = {
        "model": {"name": str(folder / "base"), "dtype": "bfloat16"},
        "plugins": ["synthetic", "hf", *adapter, "sft", "adamw", "trainer", *plugins],
        "use": {"load_processor": "synthetic", **({"place_model": "fsdp"} if "fsdp" in plugins else {})},
        **({"lora": LORA} if adapter else {}),
        "adamw": {"learning_rate": RATE, "schedule": "constant"},
        "trainer": {
            "max_steps": STEPS,
            "micro_batch": MICRO_BATCH,
            "batch": ROWS_PER_STEP,
            "precision": "bf16",
            "log_every": LOG_EVERY,
            "save_every": None,
            "shuffle": False,
            "progress": "none",
        },
        "output": str(folder / "run"),
        **more,
    }
    try:
        execute(compose(config, instances={"synthetic": Synthetic()}))
        clock.note = f"checkpoint and export in {time.perf_counter() - clock.times[-1]:.1f} s"
    except Enough:
        pass


class Silent:
    """A tokenizer that has nothing to save."""

    def save_pretrained(self, folder: Path) -> None: ...


def plain_torch(folder: Path, clock: Clock, trains: str) -> None:
    """FSDP2 as its documentation has it: a loop, `fully_shard`, AdamW."""
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from transformers import AutoModelForCausalLM

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    distributed.init_process_group("nccl", device_id=torch.device("cuda", rank))
    kind = torch.float32 if trains == "all" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=kind)
    if trains == "adapter":
        model = with_adapter(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = model.model.layers if trains == "all" else model.base_model.model.model.layers
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    rows, count = Rows().ids, ROWS_PER_STEP * (LENGTH - 1)
    clock.start()
    total = torch.zeros((), device="cuda")
    for step in range(1, STEPS + 1):
        mine = rows[(step - 1) * ROWS_PER_STEP : step * ROWS_PER_STEP][rank::ranks].cuda(non_blocking=True)
        parts = mine.split(MICRO_BATCH)
        for index, ids in enumerate(parts):
            model.set_requires_gradient_sync(index == len(parts) - 1)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum") / count
            (loss * ranks).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % LOG_EVERY == 0:
            distributed.all_reduce(total)
            clock.logged(step, float(total) / LOG_EVERY)
            total.zero_()


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear"),
        autocast_adapter_dtype=True,
    )


def transformers_trainer(folder: Path, clock: Clock, trains: str) -> None:
    """Trainer with FSDP2 of accelerate."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            clock.start()

        def on_log(self, args: object, state: Any, control: object, logs: Any = None, **_: object) -> None:
            if "loss" in logs:
                clock.logged(state.global_step, float(logs["loss"]))

    kind = torch.float32 if trains == "all" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=kind)
    model = with_adapter(model) if trains == "adapter" else model
    ids = Rows().ids.tolist()
    ranks = int(os.environ["WORLD_SIZE"])
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ROWS_PER_STEP // MICRO_BATCH // ranks,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        bf16=True,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        fsdp="full_shard auto_wrap",
        fsdp_config={"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Watch()]).train()


SHARDED = {"plugins": ("fsdp",)}
CONTENDERS: dict[str, tuple[int, str, Any, dict[str, Any]]] = {
    "pegbox, one GPU": (1, "all", pegbox, {}),
    "pegbox DDP": (2, "all", pegbox, {}),
    "pegbox fsdp": (2, "all", pegbox, SHARDED),
    "torch FSDP2": (2, "all", plain_torch, {}),
    "transformers Trainer FSDP2": (2, "all", transformers_trainer, {}),
    "pegbox DDP, adapter": (2, "adapter", pegbox, {}),
    "pegbox fsdp, adapter": (2, "adapter", pegbox, SHARDED),
    "torch FSDP2, adapter": (2, "adapter", plain_torch, {}),
    "pegbox fsdp, kept gathered": (2, "all", pegbox, {**SHARDED, "fsdp": {"reshard_after_forward": False}}),
    "pegbox fsdp, recomputed": (2, "all", pegbox, {"plugins": ("activations", "fsdp")}),
    "pegbox fsdp, offloaded": (2, "all", pegbox, {**SHARDED, "fsdp": {"offload": True}}),
    "pegbox fsdp, saved": (2, "all", pegbox, {**SHARDED, "save": True}),
}
WAITING = ("pegbox fsdp, offloaded", "pegbox, one GPU", "pegbox DDP", "pegbox DDP, adapter", "pegbox fsdp, saved")
"""Contenders that may make the host wait: an optimizer on the CPU does, and the others are measured elsewhere."""


def compete(name: str, folder: Path) -> None:
    """One contender in this process, one of several."""
    _, trains, contender, more = CONTENDERS[name]
    clock = Clock()
    if contender is pegbox:
        more = {**more, "strict": name not in WAITING}
        clock.note = "host never waits between logs" if more["strict"] else ""
    contender(folder, clock, trains, **more)
    (folder / f"row-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(clock.row()))
    sys.stdout.flush()
    os._exit(0)


def measure(name: str, folder: Path) -> list[str]:
    """Start the processes of a contender; one row over all of them."""
    processes, trains, _, _ = CONTENDERS[name]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    start = time.perf_counter()
    for old in folder.glob("row-*.json"):
        old.unlink()
    command = [*launcher, __file__, "--contender", name, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    subprocess.run(["rm", "-rf", str(folder / "run"), str(folder / "trainer")], check=False)
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("row-*.json"))]
    print(f"{name}: {time.perf_counter() - start:.0f} s, exit code {done.returncode}", flush=True)
    if len(found) != processes:
        print("\n".join((done.stdout + done.stderr).splitlines()[-60:])[-5000:], flush=True)
        return []
    largest = {key: max(row[key] for row in found) for key in ("step_ms", "peak_bytes", "start_peak_bytes")}
    pace = ROWS_PER_STEP * LENGTH / largest["step_ms"] * 1e3
    losses = " ".join(f"{loss:.4f}" for loss in found[0]["losses"])
    host = " ".join(str(row["host_peak_bytes"]) for row in found)
    figures = [f"{largest['step_ms']:.1f}", f"{pace:.0f}", str(largest["peak_bytes"]), str(largest["start_peak_bytes"])]
    return [name, trains, str(processes), *figures, host, losses, found[0]["note"]]


def save_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--contender")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.contender:
        compete(options.contender, options.folder)
    commit = options.commit or subprocess.getoutput("git describe --always --dirty")
    where = [torch.cuda.get_device_name(), torch.__version__, commit, datetime.now(UTC).date().isoformat()]
    rows = [[*HEAD, "gpu", "torch", "commit", "date"]]
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        save_model(Path(folder) / "base")
        torch.cuda.empty_cache()
        for name in options.only:
            row = measure(name, Path(folder))
            if row:
                rows.append([*row, *where])
                print("  ".join(rows[-1]), flush=True)
            if options.results:
                with options.results.open("w", newline="") as file:
                    csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main()
