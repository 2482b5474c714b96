"""The same training by transformers' Trainer and by this package, alone or under torchrun; results go to files.

Run as `torchrun --nproc-per-node 2 peer_runs.py FOLDER` it does every comparison that needs two processes at once,
because starting processes takes longer than training in them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import tiny_llama
import torch
from pegbox.hooks import hookimpl
from safetensors.torch import load_file
from tiny_runs import checkpoint, records, run, tiny_config
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

STEPS, RATE, DECAY, CLIP, WARMUP = 20, 1e-3, 0.1, 0.5, 3


class Recorder:
    """Observes our run: the loss of each step, and the first gradient."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradient: dict[str, torch.Tensor] = {}

    @hookimpl
    def on_event(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "Stepped":
            self.losses.append(event.loss.item())
        if kind == "GradientsReady" and event.step == 1:
            parameters = event.model.module.named_parameters()
            self.gradient = {name: p.grad.clone() for name, p in parameters}


def settings(accumulation: int, micro_batch: int, rows: int) -> dict[str, Any]:
    """Our settings of the comparison; rows in the order of the data set, for which Trainer has a sampler."""
    return {
        "tiny": {"rows": rows},
        "adamw": {"learning_rate": RATE, "weight_decay": DECAY, "warmup_steps": WARMUP},
        "max_steps": STEPS,
        "shuffle": False,
        "max_grad_norm": CLIP,
        "accumulation": accumulation,
        "micro_batch": micro_batch,
        "precision": "fp32",
    }


def train_with_pegbox(folder: Path, accumulation: int, micro_batch: int, rows: int) -> dict[str, Any]:
    recorder = Recorder()
    run(tiny_config(folder, plugins=["recorder"], **settings(accumulation, micro_batch, rows)), recorder=recorder)
    norms = [record["grad_norm"] for record in records(folder, "train")]
    weights = load_file(checkpoint(folder, STEPS) / "model.safetensors")
    clip = min(1.0, CLIP / norms[0])
    gradient = {name: clip * part for name, part in recorder.gradient.items()}
    return {"losses": recorder.losses, "norms": norms, "weights": weights, "gradient": gradient}


class Watch(TrainerCallback):
    """Observes Trainer: the first gradient as the optimizer gets it."""

    def __init__(self) -> None:
        self.gradient: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.gradient:
            self.gradient = {name: p.grad.clone() for name, p in model.named_parameters()}


class InOrder(Trainer):
    """Trainer, taking rows in order."""

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def train_with_transformers(folder: Path, accumulation: int, micro_batch: int, rows: int) -> dict[str, Any]:
    watch, examples = Watch(), tiny_llama.Rows(tiny_llama.TinyLlamaConfig(rows=rows), "train")
    trainer = InOrder(
        model=tiny_llama.build_model(),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=RATE,
            weight_decay=DECAY,
            warmup_steps=WARMUP,
            lr_scheduler_type="linear",
            max_grad_norm=CLIP,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=[examples[index] for index in range(rows)],
        data_collator=lambda batch: pad(batch, tiny_llama.PAD),
        callbacks=[watch],
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = trainer.accelerator.unwrap_model(trainer.model)
    weights = {name: p.detach().clone() for name, p in trained.named_parameters()}
    gradient = {name.removeprefix("module."): part for name, part in watch.gradient.items()}
    return {
        "losses": [entry["loss"] for entry in history],
        "norms": [float(entry["grad_norm"]) for entry in history],
        "weights": weights,
        "gradient": gradient,
    }


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["losses"]) == len(theirs["losses"]) == 20
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=2e-5, atol=0)
    assert ours["gradient"].keys() == theirs["gradient"].keys() == ours["weights"].keys()
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, gradient in ours["gradient"].items():
        torch.testing.assert_close(gradient, theirs["gradient"][name], rtol=1e-4, atol=1e-7)
    start = dict(tiny_llama.build_model().named_parameters())
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=2e-6)
        assert (weight - start[name]).abs().max() > 1e-3, "and training moved it far beyond the tolerance"


def pad(batch: list[Any], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows padded on the right, labels not shifted, as Trainer wants them."""

    def column(values: list[Any], filler: int) -> torch.Tensor:
        rows = [torch.tensor(value) for value in values]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)

    return {
        "input_ids": column([example.input_ids for example in batch], pad_id),
        "labels": column([example.labels for example in batch], -100),
        "attention_mask": column([[1] * len(example.input_ids) for example in batch], 0),
    }


def compare_on_two_processes(folder: Path) -> None:
    """Every comparison for two processes: Trainer's first, because it keeps the process group that it makes."""
    for accumulation, micro_batch in ((1, 4), (4, 1)):
        name, rows = f"{accumulation}x{micro_batch}", 2 * STEPS * accumulation * micro_batch
        theirs = train_with_transformers(folder / f"{name}-theirs", accumulation, micro_batch, rows)
        ours = train_with_pegbox(folder / name, accumulation, micro_batch, rows)
        if os.environ["RANK"] == "0":
            torch.save({"ours": ours, "theirs": theirs}, folder / f"{name}.pt")
    interrupt_one_rank(folder)
    run(elastic(folder, max_steps=5))


def elastic(folder: Path, **keys: Any) -> dict[str, Any]:
    """A run that is the same on any number of processes: packed, streamed, one global batch, no dropout."""
    tiny = {"rows": 41, "eval_rows": 7, "stream": True, "capacity": 40}
    flat = {"schedule": "constant"}
    sizes = {"micro_batch": 2, "batch": 6, "stream_window": 11, "log_every": 1, "max_grad_norm": CLIP}
    return tiny_config(folder / "elastic", tiny=tiny, adamw=flat, precision="fp32", **sizes, **keys)


class CtrlC:
    """Sends this process a Ctrl-C after a step; `rank` chooses one process."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    @hookimpl
    def on_event(self, ctx: Any, event: Any) -> None:
        if type(event).__name__ == "Stepped" and event.step == self.step and ctx.runtime.rank == self.rank:
            os.kill(os.getpid(), signal.SIGINT)


def interrupt_one_rank(folder: Path) -> None:
    """A run of 12 steps; and one that a Ctrl-C on rank 1 alone interrupts after 5, and that is resumed."""
    keys: dict[str, Any] = {"max_steps": 12, "micro_batch": 2, "accumulation": 2, "log_every": 3, "eval_every": 4}
    keys |= {"plugins": ["stop"], "tiny": {"rows": 41, "dropout": 0.1, "eval_rows": 7}}
    outcomes = {}
    for name, step, resume in (("whole", 0, None), ("parted", 5, None), ("parted", 0, "auto")):
        outcome = run(tiny_config(folder / name, resume=resume, **keys), stop=CtrlC(step, rank=1))
        outcomes[f"{name}/{resume}"] = (outcome.reason, outcome.step)
    (folder / f"outcomes-{os.environ['RANK']}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_on_two_processes(Path(sys.argv[1]))
    # gloo's threads may still run when Python shuts down, and then abort the process: what is tested is done by now.
    sys.stdout.flush()
    os._exit(0)
