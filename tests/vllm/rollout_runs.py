"""Runs that have started, without a trainer: what a method such as GRPO would have when it asks for rollouts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from pegbox import hooks
from pegbox.assembly import model_request, prepare_model
from pegbox.context import Context
from pegbox.events import RunBegins, RunStarted
from pegbox.plan import compose
from pegbox.rollouts import Rollout, RolloutBatch, RolloutRequest, Sampling, SyncReceipt, WeightUpdate
from pegbox.testing import FakeRuntime
from pegbox.types import Job, Model

REPOSITORY = Path(__file__).parents[2]
VLLM_PYTHON = REPOSITORY / ".venv-vllm/bin/python"
OWN = {
    "python": str(VLLM_PYTHON),
    "eager": True,
    "max_model_len": 128,
    "start_timeout_s": 240.0,
    "args": ["--kv-cache-memory-bytes", str(2**26), "--max-num-seqs", "32"],
    "env": {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
}
"""Settings of a small server that the run starts."""
WORKER = REPOSITORY / "plugins/rollout-vllm/pegbox_rollout_vllm/worker"
SHARED = {
    **OWN,
    "args": [*OWN["args"], "--worker-extension-cls", "pegbox_broadcast.Receiver"],  # type: ignore[misc]
    "env": {**OWN["env"], "PYTHONPATH": str(WORKER)},  # type: ignore[dict-item]
}
"""Settings of a server that takes weights in every way, as somebody would start it by hand."""
PROMPTS = tuple((5 + index, 6, 7, 8) for index in range(6))


class StartedRun:
    """A composed context whose model is placed and whose observers heard that the run started."""

    def __init__(self, folder: Path, base: Path, *, lora: bool, **section: Any) -> None:
        config = {
            "model": {"name": str(base), "dtype": "float32"},
            "plugins": ["hf", *(["lora"] if lora else []), "trainer", "rollout-vllm"],
            "output": str(folder),
            "trainer": {"max_steps": 1, "gradient_proof": {"steps": 0}},
            "rollout-vllm": section,
            **({"lora": {"r": 4, "alpha": 8}} if lora else {}),
        }
        self.ctx: Context = compose(config, ())
        self.ctx.notify(RunBegins())
        self.ctx.processor = self.ctx.call(hooks.load_processor, self.ctx)
        self.ctx.runtime = FakeRuntime()
        self.ctx.total_steps = None
        self.model: Model = prepare_model(self.ctx, model_request(self.ctx))
        missing = cast("Any", None)
        job = Job(
            model=self.model,
            loss=missing,
            train=missing,
            eval=None,
            optimization=missing,
            checkpoints=missing,
        )
        self.ctx.notify(RunStarted(job=job, step=0))

    def learn(self, seed: int, size: float = 0.02) -> None:
        """Change what is trained, as an optimizer step would."""
        source = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=source), alpha=size)

    @property
    def vllm(self) -> Any:
        """What the plugin speaks with."""
        return self.ctx.kernel.active["rollout-vllm"].instance._engine._vllm  # type: ignore[attr-defined]

    def sync(self, version: int) -> SyncReceipt:
        update = WeightUpdate(version=version, kind="adapter" if self.model.adapter else "full", tensors=())
        ((_, receipt),) = self.ctx.each(hooks.sync_weights, self.ctx, update)
        return receipt

    def generate(
        self, samples: int = 1, prompts: Sequence[tuple[int, ...]] = PROMPTS, **sampling: Any
    ) -> tuple[Rollout, ...]:
        request = RolloutRequest(
            prompts=tuple(prompts),
            columns=tuple({"row": row} for row in range(len(prompts))),
            samples=samples,
            sampling=Sampling(**{"max_tokens": 8, "seed": 3, **sampling}),
        )
        batch: RolloutBatch = self.ctx.call(hooks.generate_rollouts, self.ctx, request)
        assert batch.samples == samples
        return batch.rollouts

    def logits(self, rollout: Rollout) -> torch.Tensor:
        """The trainer's logits before each completion token, `_SV`, by transformers' plain forward."""
        with torch.no_grad():
            ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
            return self.model.module(input_ids=ids).logits[0, len(rollout.prompt) - 1 : -1].float()

    def close(self) -> None:
        self.ctx.exit.close()


def processes(text: str) -> list[int]:
    """Processes whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid() and text in command_line(int(entry.name)):
            found.append(int(entry.name))
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def server_of(base: Path, *, guarded: bool = False) -> int:
    """The process of the one server of a model, or its guard; one that begins has no command line for a moment."""
    limit = time.monotonic() + 10
    while True:
        found = processes(f"--model {base} --served-model-name")
        pids = [pid for pid in found if ("guard.py" in command_line(pid)) is guarded]
        if pids or time.monotonic() > limit:
            (pid,) = pids
            return pid
        time.sleep(0.05)
