"""The section `trainer` of a config."""

from __future__ import annotations

import re
from typing import Literal

from pegbox.errors import ConfigError
from pegbox.section import Section, setting
from pydantic import model_validator

Precision = Literal["auto", "fp32", "bf16", "fp16"]
SAVE_EVERY = 100


class GradientProofConfig(Section):
    """Whether training reaches what it should."""

    steps: int = setting(
        3, "How many of the first steps are looked at; 0 leaves the proof out.", unit="optimizer steps", ge=0
    )
    allow: tuple[str, ...] = setting((), "Expressions found in names of parameters that may stay without a gradient.")

    @model_validator(mode="after")
    def _expressions(self) -> GradientProofConfig:
        for expression in self.allow:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"allow {expression!r} is no regular expression: {error}; escape it") from error
        return self


class TrainerConfig(Section):
    """How long to train, in which batches and precision, and when to log, evaluate and save."""

    max_steps: int | None = setting(
        None, "Length of the run; the data repeats as needed.", unit="optimizer steps", ge=1
    )
    epochs: float | None = setting(
        None, "Length of the run in passes over the data; 1 unless max_steps is set.", unit="epochs", gt=0
    )
    micro_batch: int = setting(4, "Rows of one forward and backward on one process.", unit="rows", ge=1)
    accumulation: int = setting(1, "Micro-batches of one optimizer step on one process.", unit="micro-batches", ge=1)
    batch: int | None = setting(
        None,
        "Rows of one optimizer step over all processes, instead of accumulation; so a run is the same on any number.",
        unit="rows",
        ge=1,
    )
    eval_micro_batch: int | None = setting(
        None, "Rows of one forward in evaluation; micro_batch unless set.", unit="rows", ge=1
    )
    shuffle: bool = setting(True, "Take rows in a new random order each epoch, which depends on the seed alone.")
    stream_window: int = setting(
        8192,
        "Rows of a stream that are shuffled and packed among themselves; memory grows with it.",
        unit="rows",
        ge=1,
    )
    precision: Precision = setting(
        "auto", "Arithmetic of the forward; auto is bf16 where CUDA has it natively, else fp32."
    )
    max_grad_norm: float | None = setting(
        1.0, "Largest norm of the gradient of a step, longer ones are scaled down; null never clips.", gt=0
    )
    log_every: int = setting(
        10, "How often metrics are read from the device and written.", unit="optimizer steps", ge=1
    )
    eval_every: int | None = setting(None, "How often the held-out rows are evaluated.", unit="optimizer steps", ge=1)
    eval_at_start: bool = setting(False, "Evaluate before the first step.")
    eval_at_end: bool = setting(True, "Evaluate after the last step, if there are held-out rows.")
    save_every: int | None = setting(
        SAVE_EVERY, "How often a checkpoint is saved; null only at the end.", unit="optimizer steps", ge=1
    )
    evals_per_epoch: int | None = setting(
        None, "Evaluations in each pass over the data, evenly spread; instead of eval_every.", unit="1/epoch", ge=1
    )
    saves_per_epoch: int | None = setting(
        None, "Checkpoints in each pass over the data, evenly spread; instead of save_every.", unit="1/epoch", ge=1
    )
    keep: int | None = setting(2, "How many checkpoints stay; null keeps all.", unit="checkpoints", ge=1)
    best: str | None = setting(
        None,
        "A metric of evaluations, such as eval_loss: the checkpoint where it was best stays, and is what is exported.",
    )
    best_is: Literal["lowest", "highest"] | None = setting(
        None, "Which value of `best` is the best; not set: the lowest, if its name ends in `loss`."
    )
    device: Literal["auto", "cpu"] = setting("auto", "Where to train; auto takes an accelerator if there is one.")
    deterministic: bool = setting(
        False, "Use deterministic algorithms only, so that two runs on one GPU agree bit for bit; slower."
    )
    gradient_proof: GradientProofConfig = setting(
        GradientProofConfig(),
        "In the first steps every trained parameter must receive a gradient, and nothing else may: {steps, allow}.",
    )
    find_unused_parameters: bool = setting(
        False, "With several processes: allow parameters that take no part in some forwards; slower."
    )
    progress: Literal["auto", "bar", "lines", "none"] = setting(
        "auto", "What the run prints; auto is a bar on a terminal and lines elsewhere."
    )

    @model_validator(mode="after")
    def _best_is_evaluated(self) -> TrainerConfig:
        if self.best is None and self.best_is == "highest":
            raise ValueError(
                "best_is says which value of `best` is the best, but best is not set; set it, or remove this"
            )
        if self.best is not None and self.best_is is None and not self.best.endswith("loss"):
            raise ValueError(
                f"best is {self.best}, and best_is does not say which of its values is the best: set it to highest or "
                "lowest"
            )
        if self.best is not None and self.eval_every is None and self.evals_per_epoch is None:
            raise ValueError("best needs evaluations to choose from, but eval_every is not set; set it, or remove best")
        return self

    @model_validator(mode="after")
    def _one_cadence(self) -> TrainerConfig:
        if self.evals_per_epoch is not None and self.eval_every is not None:
            raise ValueError(
                "eval_every and evals_per_epoch are both set; both say when to evaluate; remove one of them"
            )
        if self.saves_per_epoch is not None and self.save_every not in (None, SAVE_EVERY):
            raise ValueError("save_every and saves_per_epoch are both set; both say when to save; remove one of them")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> TrainerConfig:
        if self.batch is not None and self.accumulation != 1:
            raise ValueError(
                f"batch is {self.batch} and accumulation is {self.accumulation}; "
                "both say how many rows a step takes; remove one of them"
            )
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError(
                f"max_steps is {self.max_steps} and epochs is {self.epochs}; "
                "both give the length of the run; remove one of them"
            )
        return self


def refuse_evaluation(config: TrainerConfig) -> None:
    """Raise ConfigError if evaluations are asked for: there are no held-out rows."""
    asked = [name for name in ("eval_every", "evals_per_epoch", "eval_at_start") if getattr(config, name)]
    if asked:
        raise ConfigError(
            f"trainer.{asked[0]} asks for evaluation, but there are no held-out rows",
            "There is nothing to evaluate on.",
            f"Name held-out rows in the data section, or remove trainer.{asked[0]}.",
        )
