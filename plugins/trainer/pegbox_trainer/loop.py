"""The training loop. One optimizer step, in order:

    the source yields this rank's micro-batches                                batches.py
    the counts of all terms are summed over micro-batches and ranks            normalization.py
    for each micro-batch: forward, its part of the loss, backward              placement.py
        (gradients are averaged over ranks with the last one)
    observers see the gradients; they are clipped; optimizer and schedule step
    every log_every steps, and only then, figures are read from the device     metrics.py, finiteness.py
    evaluation and checkpoints where they are due or asked for                 evaluation.py, checkpoints.py

The loop never waits for the device between two logged steps, evaluations or checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError, RunError
from pegbox.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    GradientsReady,
    Logged,
    RunStarted,
    Signal,
    Stepped,
)
from pegbox.rows import Batch
from pegbox.types import Checkpoint, Job, LossOutput, Outcome

from pegbox_trainer.best import BestCheckpoint
from pegbox_trainer.config import TrainerConfig
from pegbox_trainer.evaluation import evaluate
from pegbox_trainer.finiteness import FiniteWatch, StepTrace, without_tensors
from pegbox_trainer.interruption import Interruption
from pegbox_trainer.metrics import Meter, MetricsFile, declared_extremes
from pegbox_trainer.normalization import StepCounts, count_step
from pegbox_trainer.progress import RunProgress
from pegbox_trainer.runtime import resolve_precision, seed_process

if TYPE_CHECKING:
    from pegbox.context import Context
    from torch import Tensor

SMALLEST_LOSS_SCALE = 1.0


class TrainingLoop:
    """One run of the loop. Checkpoints keep its step and the figures not yet logged, for each rank."""

    state_scope = "rank"

    def __init__(self, ctx: Context, job: Job) -> None:
        assert job.model.placement is not None, "the loop trains a model that was placed"
        assert job.model.forward is not None, "the loop trains a model that was placed"
        self.ctx, self.job, self.config = ctx, job, ctx.section(TrainerConfig)
        self.runtime, self.placement, self.forward = ctx.runtime, job.model.placement, job.model.forward
        self.optimizer, self.schedule = job.optimization.optimizer, job.optimization.schedule
        self.total_steps = ctx.total_steps
        self.step = 0
        self.precision = resolve_precision(self.config, self.runtime.device)
        self.scaler = torch.amp.GradScaler(self.runtime.device.type, enabled=self.precision == "fp16")
        self.extremes = declared_extremes(ctx)
        self.meter = Meter(self.runtime, self.extremes)
        self.watch = FiniteWatch(self.runtime, job.train)
        self.file = MetricsFile(ctx.folder / "metrics.jsonl", writes=self.runtime.rank == 0)
        self.progress = RunProgress(self.config.progress, self.total_steps, shown=self.runtime.rank == 0)
        self.best = BestCheckpoint.of(self.config, job.checkpoints, evaluated=job.eval is not None)
        self.interruption = Interruption()
        self.interrupted = False
        self.wishes = Signal.NONE
        self.latest: dict[str, float] = {}
        self.evaluated_at: int | None = None
        self.checkpoint: Checkpoint | None = None
        self._pending = Signal.NONE
        self._written = 0
        self._passed: tuple[float, float] = (0.0, 0.0)

    def run(self) -> Outcome:
        """Train to the end, or until a signal or an observer stops it."""
        with self.interruption, self.progress:
            self._begin()
            first = self.step + 1
            for micro_batches in () if self._complete() else self.job.train:
                with self.ctx.phase("learn"):
                    self._optimizer_step(micro_batches)
                if self.step == first:
                    self.ctx.kernel.patches.verify()
                self._act_on_step()
                if self._complete() or self.interrupted or Signal.STOP in self.wishes:
                    break
            return self._finish()

    # ---- begin and end ----

    def _begin(self) -> None:
        config = self.config
        if self._epoch() is None and (config.evals_per_epoch or config.saves_per_epoch):
            raise ConfigError(
                "trainer.evals_per_epoch or saves_per_epoch is set, but the training rows are a stream",
                "A stream has no epochs that could be divided.",
                "Set trainer.eval_every and trainer.save_every.",
            )
        seed_process(self.ctx.rng("trainer/process", self.runtime.rank))
        self.ctx.register_state("trainer/loop", self)
        if self.job.resume is not None:
            self.job.checkpoints.restore(self.job.resume, self.job.model, self.job.optimization)
            self.checkpoint = self.job.resume
        self._passed = (0.0, self._epoch() or 0.0)
        self.file.cut(self._written)
        self._introduce()
        self._notify(RunStarted(job=self.job, step=self.step))
        if self.step == 0 and self.config.eval_at_start:
            self._evaluate()
        self.progress.begin(self.step)

    def _introduce(self) -> None:
        parameters = list(self.job.model.module.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        self.progress.note(
            f"{self.job.model.name} on {self.placement.name} in {self.precision}: "
            f"{trained:,} of {sum(p.numel() for p in parameters):,} parameters trained, "
            f"{self.total_steps or 'no end of'} steps"
        )
        if self.checkpoint is not None:
            self.progress.note(f"resumed from {self.checkpoint.path}")

    def _finish(self) -> Outcome:
        interrupted = self.interrupted and not self._complete()
        if not interrupted:
            if not self.meter.empty:
                self._log()
            if self.job.eval is not None and self.config.eval_at_end and self.evaluated_at != self.step:
                self._evaluate()
        else:
            self.progress.note("interrupted: saving a checkpoint (Ctrl-C stops at once)")
        if self.step > 0 and (self.checkpoint is None or self.checkpoint.step != self.step):
            self._save()
        if not interrupted:
            self._return_to_best()
        stopped = Signal.STOP in self.wishes and not self._complete()
        reason: Any = "interrupted" if interrupted else "stopped" if stopped else "finished"
        return Outcome(reason=reason, step=self.step, metrics=self.latest, checkpoint=self.checkpoint)

    def _return_to_best(self) -> None:
        """Bring back the weights that evaluated best, for the export."""
        best = self.best.checkpoint()
        if best is not None and best.step != self.step:
            self.placement.load(best.path, self.optimizer)
            self.latest[f"best_{self.best.metric}"] = self.best.value
            self.progress.note(
                f"exporting step {best.step}: its {self.best.metric}, {self.best.value:.4f}, was the best"
            )

    # ---- one step ----

    def _optimizer_step(self, micro_batches: Sequence[Batch]) -> None:
        counts = count_step(self.runtime, self.job.loss, micro_batches)
        parts: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            with self.placement.synchronize_gradients(index == len(micro_batches) - 1):
                values_K, output = self._forward(batch, counts)
                # Counts are those of all ranks and gradients are averaged over ranks: times ranks is the sum.
                self.scaler.scale(values_K[0] * self.runtime.world_size).backward()
            parts.append(values_K.detach())
            self.meter.add_batch(batch, output.metrics)
        parts_MK = torch.stack(parts)
        values_K = self.runtime.sum(parts_MK.sum(0))

        self.scaler.unscale_(self.optimizer)
        self._notify(GradientsReady(step=self.step + 1, model=self.job.model, optimizer=self.optimizer))
        norm = self.placement.clip_gradients(self.config.max_grad_norm)
        learning_rate = self.schedule.get_last_lr()[0]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

        self.meter.add_step(counts, values_K, norm, float(learning_rate))
        light = tuple(without_tensors(batch) for batch in micro_batches)
        trace = StepTrace(self.step, light, torch.isfinite(parts_MK[:, 0]), values_K[0], norm, counts.nothing)
        self.watch.add(trace, gradients_may_overflow=self.scaler.is_enabled())
        self._notify(Stepped(step=self.step, model=self.job.model, optimizer=self.optimizer, loss=values_K[0]))

    def _forward(self, batch: Batch, counts: StepCounts) -> tuple[Tensor, LossOutput]:
        placed = batch.to(self.runtime.device)
        output = self.job.loss(placed, self.forward(placed, self.job.loss.needs))
        return counts.values(output), output

    # ---- between steps ----

    def _act_on_step(self) -> None:
        """Log, evaluate and save where it is due or asked for; `_finish` does what the last step needs."""
        self.progress.step(self.step)
        self._passed = (self._passed[1], self._epoch() or 0.0)
        config = self.config
        if self._due(config.log_every):
            self._log()
        self._agree(at_once=False)
        evaluates = self._due(config.eval_every, config.evals_per_epoch) or Signal.EVAL in self.wishes
        if self.job.eval is not None and evaluates:
            self._evaluate()
            self._agree(at_once=True)
        saves = self._due(config.save_every, config.saves_per_epoch) or Signal.SAVE in self.wishes
        if not self._complete() and saves:
            self._save()
            self._agree(at_once=True)
        self.wishes &= Signal.STOP

    def _complete(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    def _due(self, every: int | None, per_epoch: int | None = None) -> bool:
        if per_epoch is not None:
            before, now = (math.floor(epochs * per_epoch + 1e-9) for epochs in self._passed)
            return now > before
        return every is not None and self.step % every == 0

    def _epoch(self) -> float | None:
        """Passes over the data so far; None for a stream, and for a source of another plugin."""
        return getattr(self.job.train, "epoch", None)

    def _notify(self, event: Event) -> None:
        self._pending |= self.ctx.notify(event)

    def _agree(self, *, at_once: bool) -> None:
        """Combine what observers and signals asked for, over all ranks.

        On several GPUs this waits for the device, so it is done where the loop waits anyway: a wish takes
        effect at the next logged step.
        """
        interrupted = self.interruption.requested
        if self.runtime.world_size > 1:
            if not at_once and self.runtime.device.type != "cpu" and not self._due(self.config.log_every):
                return
            own = [flag in self._pending for flag in Signal] + [interrupted]
            told = self.runtime.sum(torch.tensor(own, dtype=torch.int32, device=self.runtime.device)).tolist()
            for flag, count in zip(Signal, told, strict=False):
                self._pending |= flag if count else Signal.NONE
            interrupted = told[-1] > 0
        self.wishes |= self._pending
        self._pending = Signal.NONE
        self.interrupted |= interrupted

    def _log(self) -> None:
        self.watch.check()
        metrics = self.meter.read()
        if (epoch := self._epoch()) is not None:
            metrics["epoch"] = epoch
        if self.scaler.is_enabled():
            metrics["loss_scale"] = self._loss_scale()
        self.latest |= metrics
        self.file.append("train", self.step, metrics)
        self.progress.logged(self.step, metrics)
        self._notify(Logged(step=self.step, metrics=metrics))

    def _loss_scale(self) -> float:
        scale = float(self.scaler.get_scale())
        if scale < SMALLEST_LOSS_SCALE:
            raise RunError(
                f"step {self.step}: the fp16 loss scale fell to {scale}",
                "Gradients overflow at every scale, so no step is made any more.",
                "Set trainer.precision to bf16 or fp32.",
            )
        return scale

    def _evaluate(self) -> None:
        assert self.job.eval is not None, "callers ask"
        with self.meter.pause():
            metrics = evaluate(self.runtime, self.job.model, self.job.loss, self.job.eval, self.extremes)
        self.evaluated_at = self.step
        self.latest |= metrics
        self.file.append("eval", self.step, metrics)
        self.progress.evaluated(self.step, metrics)
        if self.step > 0 and self.best.see(self.step, metrics):
            self._pending |= Signal.SAVE
        self._notify(Evaluated(step=self.step, model=self.job.model, metrics=metrics))

    def _save(self) -> None:
        self.watch.check()
        self.file.sync()
        with self.meter.pause():
            self.checkpoint = self.job.checkpoints.save(self.step, self.job.model, self.job.optimization)
        self._notify(CheckpointSaved(checkpoint=self.checkpoint))

    # ---- state ----

    def state_dict(self) -> dict[str, object]:
        return {
            "step": self.step,
            "meter": self.meter.state_dict(),
            "scaler": self.scaler.state_dict(),
            "latest": dict(self.latest),
            "evaluated_at": self.evaluated_at,
            "best": self.best.state_dict(),
            "metrics_bytes": self.file.size(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.meter.load_state_dict(state_dict["meter"])
        self.scaler.load_state_dict(state_dict["scaler"])
        self.latest = dict(state_dict["latest"])
        self.evaluated_at = state_dict["evaluated_at"]
        self.best.load_state_dict(state_dict["best"])
        self._written = state_dict["metrics_bytes"]

    def load_rank_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of another number of ranks: what each had summed for itself goes to the first."""
        self.load_state_dict(states[0])
        self.meter.load_rank_states([state["meter"] for state in states])
