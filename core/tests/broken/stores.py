"""Checkpoint stores that break one promise each. The sound one writes a folder and renames it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pegbox.errors import RunError
from pegbox.types import Checkpoint


class SoundStore:
    """One folder for each step, complete or absent."""

    name = "step-{:06}"

    def __init__(self, ctx: Any) -> None:
        self.ctx, self.folder = ctx, ctx.folder / "checkpoints"

    def list(self) -> list[Checkpoint]:
        found = [(self.step_of(path), path) for path in sorted(self.folder.glob("step-*"))]
        return [Checkpoint(step=step, path=path) for step, path in found]

    def step_of(self, path: Path) -> int:
        return int(path.name.partition("-")[2])

    def save(self, step: int, model: Any, optimization: Any) -> Checkpoint:
        unfinished, final = self.folder / "unfinished", self.folder / self.name.format(step)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        self.write(unfinished, model, optimization)
        unfinished.rename(final)
        return Checkpoint(step=step, path=final)

    def write(self, folder: Path, model: Any, optimization: Any) -> None:
        model.placement.save(folder, optimization.optimizer)
        state = {"schedule": optimization.schedule.state_dict(), "states": self.states()}
        torch.save(state, folder / "state.pt")

    def states(self) -> dict[str, Any]:
        return {key: state.state_dict() for key, state in self.ctx.states.items()}

    def restore(self, checkpoint: Checkpoint, model: Any, optimization: Any) -> None:
        state = torch.load(checkpoint.path / "state.pt", weights_only=True)
        if state["states"].keys() != self.ctx.states.keys():
            raise RunError("other states", "They differ.", "Use the same plugins.")
        self.read(checkpoint.path, state, model, optimization)

    def read(self, folder: Path, state: Any, model: Any, optimization: Any) -> None:
        model.placement.load(folder, optimization.optimizer)
        optimization.schedule.load_state_dict(state["schedule"])
        for key, value in state["states"].items():
            self.ctx.states[key].load_state_dict(value)


class ForgetsTheSchedule(SoundStore):
    def read(self, folder: Path, state: Any, model: Any, optimization: Any) -> None:
        state["schedule"] = optimization.schedule.state_dict()
        super().read(folder, state, model, optimization)


class RoundsTheWeights(SoundStore):
    """Keeps the weights in bfloat16."""

    def read(self, folder: Path, state: Any, model: Any, optimization: Any) -> None:
        super().read(folder, state, model, optimization)
        with torch.no_grad():
            for parameter in model.module.parameters():
                parameter.copy_(parameter.bfloat16())


class StatesAsText(SoundStore):
    """Writes the registered states as JSON, which has no tensors."""

    def states(self) -> dict[str, Any]:
        return json.loads(json.dumps(super().states(), default=lambda tensor: tensor.tolist()))


class SortedByName(SoundStore):
    name = "step-{}"


class ListInMemory(SoundStore):
    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.saved: list[Checkpoint] = []

    def list(self) -> list[Checkpoint]:
        return self.saved

    def save(self, step: int, model: Any, optimization: Any) -> Checkpoint:
        self.saved.append(super().save(step, model, optimization))
        return self.saved[-1]


class WritesInPlace(SoundStore):
    def save(self, step: int, model: Any, optimization: Any) -> Checkpoint:
        final = self.folder / self.name.format(step)
        final.mkdir(parents=True)
        self.write(final, model, optimization)
        return Checkpoint(step=step, path=final)


class ToleratesStates(SoundStore):
    """Restores what it can."""

    def restore(self, checkpoint: Checkpoint, model: Any, optimization: Any) -> None:
        state = torch.load(checkpoint.path / "state.pt", weights_only=True)
        state["states"] = {key: value for key, value in state["states"].items() if key in self.ctx.states}
        self.read(checkpoint.path, state, model, optimization)
