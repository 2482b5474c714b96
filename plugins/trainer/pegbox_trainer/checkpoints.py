"""Checkpoints as folders that are complete or absent.

    <run>/checkpoints/step-00000020/
        model.safetensors optimizer.pt     what the placement saves: trained parameters, optimizer state
        schedule.pt                        the learning-rate schedule
        states/<plugin>/<name>.pt          every registered state; one per rank where it says so
        random/rank-00000.pt               the global random generators of each process
        meta.json                          step, plan, versions, and the list of states

Rows, weights and optimizer do not depend on the number of processes; random generators do, and start anew where it has
changed. A checkpoint is written to a temporary sibling, synced to disk, and renamed: a process that is killed at any
moment leaves a complete one or none. Rotation renames before it deletes, for the same reason.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import PegboxError, RunError
from pegbox.record import Stateful
from pegbox.types import Checkpoint, Model, Optimization
from torch.optim.lr_scheduler import LambdaLR

from pegbox_trainer.config import TrainerConfig
from pegbox_trainer.record import versions
from pegbox_trainer.runtime import seed_process
from pegbox_trainer.states import (
    FOLDER,
    random_state,
    read_state,
    restore_random_state,
    sync_path,
    sync_tree,
    undamaged,
    write_state,
)

if TYPE_CHECKING:
    from pegbox.context import Context

FORMAT = 2
NAME = re.compile(r"step-(\d{8,})")
META = "meta.json"
TEMPORARY = ".tmp-"
SUPERSEDED = "superseded"
LIBRARIES = ("pegbox-core", "pegbox-trainer", "torch", "accelerate", "transformers", "peft")


@dataclass
class FolderStore:
    """The checkpoints of one run (`pegbox.types.CheckpointStore`); the one of step `best` stays when others go."""

    ctx: Context
    folder: Path
    keep: int | None
    best: int | None = None

    @classmethod
    def open(cls, ctx: Context) -> FolderStore:
        """Open the store; what a killed process left half-written is removed."""
        store = cls(ctx, ctx.folder / FOLDER, ctx.section(TrainerConfig).keep)
        store._together("open", store._clean, rank=0)
        return store

    def list(self) -> list[Checkpoint]:
        if not self.folder.is_dir():
            return []
        found = ((NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        complete = [Checkpoint(step=int(m[1]), path=path) for m, path in found if m and (path / META).is_file()]
        return sorted(complete, key=lambda checkpoint: checkpoint.step)

    def save(self, step: int, model: Model, optimization: Optimization) -> Checkpoint:
        """Save everything; every rank calls it. Old checkpoints go once this one is complete.

        Raises:
            RunError: a rank could not write. What was there before is untouched.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{TEMPORARY}{final.name}"
        self._together("save", lambda: _empty(temporary), rank=0)
        self._together("save", lambda: self._write(temporary, model, optimization))
        self._together("save", lambda: self._seal(temporary, final, step), rank=0)
        self._together("rotate", self._rotate, rank=0)
        return Checkpoint(step=step, path=final)

    def restore(self, checkpoint: Checkpoint, model: Model, optimization: Optimization) -> None:
        """Bring everything back; later checkpoints are set aside, because the run will make them anew.

        Raises:
            RunError: another number of processes, a state that is missing or that nobody claims.
        """
        folder, rank = checkpoint.path, self.ctx.runtime.rank
        with undamaged(folder / META):
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
        self._check(folder, meta)
        assert model.placement is not None, "a model is restored after it was placed"
        model.placement.load(folder, optimization.optimizer)
        optimization.schedule.load_state_dict(read_state(folder / "schedule.pt"))
        _follow(optimization.schedule)
        same = meta["world_size"] == self.ctx.runtime.world_size
        for key, state in self.ctx.states.items():
            if same or _scope(state) == "global":
                state.load_state_dict(read_state(folder / _state_file(key, state, rank)))
            else:
                files = [folder / _state_file(key, state, written) for written in range(meta["world_size"])]
                state.load_rank_states([read_state(path) for path in files])  # type: ignore[attr-defined]
        if same:
            restore_random_state(read_state(folder / _random_file(rank)), self.ctx.runtime.device)
        else:
            seed_process(self.ctx.rng(f"trainer/process/{rank}", checkpoint.step))
        self._together("restore", lambda: self._set_aside_after(checkpoint.step), rank=0)

    # ---- writing ----

    def _write(self, folder: Path, model: Model, optimization: Optimization) -> None:
        rank = self.ctx.runtime.rank
        assert model.placement is not None, "a model is saved after it was placed"
        model.placement.save(folder, optimization.optimizer)
        if rank == 0:
            write_state(folder / "schedule.pt", optimization.schedule.state_dict(), "the schedule's state")
        for key, state in self.ctx.states.items():
            if rank == 0 or _scope(state) == "rank":
                write_state(folder / _state_file(key, state, rank), state.state_dict(), f"the state '{key}'")
        write_state(folder / _random_file(rank), random_state(self.ctx.runtime.device), "the random state")

    def _seal(self, temporary: Path, final: Path, step: int) -> None:
        meta = {
            "format": FORMAT,
            "step": step,
            "world_size": self.ctx.runtime.world_size,
            "plan": self.ctx.plan.digest(),
            "versions": self._versions,
            "states": {key: _scope(state) for key, state in self.ctx.states.items()},
        }
        (temporary / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        sync_tree(temporary)
        if final.exists():
            self._delete(final)
        temporary.rename(final)
        sync_path(self.folder)

    def _rotate(self) -> None:
        if self.keep is not None:
            for old in self.list()[: -self.keep]:
                if old.step != self.best:
                    self._delete(old.path)

    def _delete(self, path: Path) -> None:
        doomed = self.folder / f"{TEMPORARY}delete-{path.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)

    def _clean(self) -> None:
        if self.folder.is_dir():
            for path in self.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(path)

    def _set_aside_after(self, step: int) -> None:
        for later in (checkpoint for checkpoint in self.list() if checkpoint.step > step):
            aside = self.folder / SUPERSEDED / later.path.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            later.path.rename(aside)

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions(LIBRARIES)

    # ---- agreement ----

    def _check(self, folder: Path, meta: dict[str, Any]) -> None:
        if meta["format"] != FORMAT:
            raise RunError(
                f"{folder} has checkpoint format {meta['format']}, this version reads {FORMAT}",
                "Formats change with versions of pegbox-trainer.",
                f"Install pegbox-trainer {meta['versions'].get('pegbox-trainer', '')}.",
            )
        now = {key: _scope(state) for key, state in self.ctx.states.items()}
        missing, unclaimed = (
            sorted(now.keys() - meta["states"].keys()),
            sorted(meta["states"].keys() - now.keys()),
        )
        if missing:
            raise RunError(
                f"{folder} has no state for {', '.join(missing)}",
                "The run would go on with that part as if it had just begun.",
                "Resume with the plugins that the run began with: see config.yaml beside it.",
            )
        if unclaimed:
            raise RunError(
                f"{folder} holds a state that nothing in this run claims: {', '.join(unclaimed)}",
                "Dropping it would change what the run does.",
                f"Add {', '.join(sorted({key.split('/')[0] for key in unclaimed}))} to plugins again.",
            )
        moved = sorted(key for key, scope in now.items() if scope != meta["states"][key])
        if moved:
            raise RunError(
                f"{folder}: the state {', '.join(moved)} was saved as "
                f"'{meta['states'][moved[0]]}' and is now '{now[moved[0]]}'",
                "A state is kept once for all ranks, or once for each.",
                "Install the version of the plugin that wrote it.",
            )

        bound = [key for key, state in self.ctx.states.items() if _scope(state) == "rank" and not _elastic(state)]
        if meta["world_size"] != self.ctx.runtime.world_size and bound:
            raise RunError(
                f"{folder} was written by {meta['world_size']} processes, this run has {self.ctx.runtime.world_size}",
                f"Each process has its own state of {', '.join(bound)}, which cannot be joined and dealt out anew.",
                f"Resume with --processes {meta['world_size']}.",
            )

    def _together(self, what: str, action: Callable[[], None], rank: int | None = None) -> None:
        """Do something on all ranks, or on one; all wait for it, and fail if one fails."""
        error: Exception | None = None
        if rank in (None, self.ctx.runtime.rank):
            try:
                action()
            except Exception as raised:
                error = raised
        told = None if error is None else f"{type(error).__name__}: {error}"
        failures = [text for text in self.ctx.runtime.gather_objects(told) if text]
        if isinstance(error, PegboxError):
            raise error
        if failures:
            raise RunError(
                f"could not {what} a checkpoint in {self.folder}: {failures[0]}",
                "Checkpoints that were complete before are untouched.",
                "Look at free space and permissions of that folder, then type resume=auto.",
            ) from error


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _elastic(state: Stateful) -> bool:
    """Whether a state of each rank can be made of those of another number of ranks: `load_rank_states(states)`."""
    return hasattr(state, "load_rank_states")


def _follow(schedule: object) -> None:
    """Set the rates of the next step by this run's schedule: a run that was made longer has another than its start."""
    if not isinstance(schedule, LambdaLR):
        return
    schedule._last_lr = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _scope(state: Stateful) -> str:
    return getattr(state, "state_scope", "global")


def _state_file(key: str, state: Stateful, rank: int) -> str:
    return f"states/{key}.rank-{rank:05d}.pt" if _scope(state) == "rank" else f"states/{key}.pt"


def _random_file(rank: int) -> str:
    return f"random/rank-{rank:05d}.pt"
