"""What a checkpoint store promises: everything comes back bit for bit, and a checkpoint is complete or absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import PegboxError
from pegbox.testing.libraries import torch
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.tiny import TinyPlacement, plain_model, tiny_batches
from pegbox.types import CheckpointStore, Model, Optimization

if TYPE_CHECKING:
    from pegbox.context import Context

OpenStore = Callable[["Context"], CheckpointStore]
MakeContext = Callable[[], "Context"]
PROBE = "conformance/probe"


class ProbeState:
    """A state as a plugin may register it: plain data and a tensor."""

    def __init__(self) -> None:
        tensor = torch().zeros(3, dtype=torch().bfloat16)
        self.value: dict[str, object] = {"step": 0, "names": ["a", "b"], "tensor": tensor}

    def advance(self) -> None:
        step = int(str(self.value["step"])) + 1
        self.value = {**self.value, "step": step, "tensor": torch().full((3,), step / 3, dtype=torch().bfloat16)}

    def state_dict(self) -> dict[str, object]:
        return dict(self.value)

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.value = dict(state_dict)


@dataclass
class Training:
    """A tiny training: model, AdamW, a schedule, and a registered state."""

    ctx: Context
    model: Model
    optimization: Optimization
    probe: ProbeState

    @classmethod
    def begin(cls, ctx: Context, seed: int = 0) -> Training:
        model = plain_model(seed, placed=True)
        optimizer = torch().optim.AdamW(model.module.named_parameters(), lr=1e-2)
        schedule = torch().optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        probe = ProbeState()
        ctx.register_state(PROBE, probe)
        return cls(ctx, model, Optimization(optimizer=optimizer, schedule=schedule), probe)

    def step(self, number: int) -> None:
        assert self.model.forward is not None, "the model is placed"
        for batch in tiny_batches(seed=number):
            logps = self.model.forward(batch, frozenset({"logps"})).logps_N
            assert logps is not None, "the model computes what it is asked for"
            (-logps.sum()).backward()
        self.optimization.optimizer.step()
        self.optimization.schedule.step()
        self.optimization.optimizer.zero_grad()
        self.probe.advance()

    def state(self) -> dict[str, object]:
        """Everything that a checkpoint holds."""
        return {
            "model": self.model.module.state_dict(),
            "optimizer": self.optimization.optimizer.state_dict(),
            "schedule": self.optimization.schedule.state_dict(),
            "registered state": self.probe.state_dict(),
        }


def differences(first: object, second: object, at: str = "") -> list[str]:
    """Where two nested states differ; tensors are compared with their dtype, bit for bit."""
    if isinstance(first, torch().Tensor) and isinstance(second, torch().Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape and bool((first == second).all())
        return [] if same else [at]
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        keys = [*first, *(key for key in second if key not in first)]
        return [found for key in keys for found in differences(first.get(key), second.get(key), f"{at} {key}".strip())]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [found for index, (a, b) in pairs for found in differences(a, b, f"{at} {index}")]
    return [] if callable(first) or first == second else [at]


def come_back_exactly(make_context: MakeContext, open_store: OpenStore) -> None:
    """Parameters, optimizer, schedule and registered states restored into fresh objects are those that were saved.

    The next step from there gives what it gave the first time.
    """
    ctx = make_context()
    first = Training.begin(ctx)
    first.step(1)
    store = open_store(ctx)
    checkpoint = store.save(1, first.model, first.optimization)
    saved = deepcopy(first.state())
    first.step(2)

    again_ctx = make_context()
    again = Training.begin(again_ctx, seed=1)
    for other in (7, 8):
        again.step(other)
    open_store(again_ctx).restore(checkpoint, again.model, again.optimization)
    why = "A run that is resumed must go on as if it had never stopped."
    fix = "Save and restore state_dict() of model, optimizer and schedule and all of ctx.states, in their own dtypes."
    different = differences(saved, again.state())
    require(not different, f"after restore these differ: {', '.join(different[:4])}", why, fix)
    again.step(2)
    different = differences(first.state(), again.state())
    require(not different, f"one step after restore these differ: {', '.join(different[:4])}", why, fix)


def are_listed_oldest_first(make_context: MakeContext, open_store: OpenStore) -> None:
    """The newest checkpoint is listed last, and another process lists the same."""
    ctx = make_context()
    training, store = Training.begin(ctx), open_store(ctx)
    require(
        not store.list(), "a new run has checkpoints", "It would go on with another run.", "Keep them in ctx.folder."
    )
    for step in (2, 10, 30):
        store.save(step, training.model, training.optimization)
    steps = [checkpoint.step for checkpoint in store.list()]
    require(
        steps == sorted(steps) and steps[-1:] == [30],
        f"after saving the steps 2, 10 and 30 the list is {steps}",
        "resume=auto goes on from the last one of the list.",
        "Sort by the number of the step, not by name.",
    )
    elsewhere = [checkpoint.step for checkpoint in open_store(make_context()).list()]
    require(
        elsewhere == steps,
        f"a store that is opened anew lists {elsewhere}, not {steps}",
        "A run is resumed by another process.",
        "Read the list from the disk.",
    )


class PowerCut(Exception):
    """Interrupts a save half-way."""


class TornPlacement(TinyPlacement):
    """Fails after it wrote its part."""

    def save(self, folder: Path, optimizer: Any) -> None:
        super().save(folder, optimizer)
        raise PowerCut("no space left")


def are_complete_or_absent(make_context: MakeContext, open_store: OpenStore) -> None:
    """A save that is interrupted leaves the list as it was, and the checkpoint before can be restored."""
    ctx = make_context()
    training, store = Training.begin(ctx), open_store(ctx)
    store.save(1, training.model, training.optimization)
    torn = replace(training.model, placement=TornPlacement(training.model.module))
    try:
        store.save(2, torn, training.optimization)
    except (PowerCut, PegboxError):
        pass
    else:
        raise RuleBroken(
            "a save whose placement fails raises nothing",
            "The run would believe in a checkpoint that does not exist.",
            "Let the error pass, or raise RunError.",
        )
    steps = [checkpoint.step for checkpoint in store.list()]
    require(
        steps == [1],
        f"after an interrupted save of step 2 the list is {steps}",
        "A run that is killed while it saves must be able to go on from the checkpoint before.",
        "Write into a temporary folder beside the final one and rename it when it is complete.",
    )
    store.restore(store.list()[0], training.model, training.optimization)


def miss_no_state(make_context: MakeContext, open_store: OpenStore) -> None:
    """A state that the checkpoint does not have, or that nobody claims, is an error."""
    ctx = make_context()
    training = Training.begin(ctx)
    checkpoint = open_store(ctx).save(1, training.model, training.optimization)
    more, fewer = make_context(), make_context()
    for label, other in (("a state that was not saved", more), ("a saved state that nobody claims", fewer)):
        resumed = Training.begin(other)
        if other is more:
            other.register_state("conformance/other", ProbeState())
        else:
            other.states.pop(PROBE)
        try:
            open_store(other).restore(checkpoint, resumed.model, resumed.optimization)
        except PegboxError:
            continue
        raise RuleBroken(
            f"restore says nothing about {label}",
            "A part of the run would begin anew while the rest goes on.",
            "Compare the keys of ctx.states with those that were saved; raise RunError if they differ.",
        )
