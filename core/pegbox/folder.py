"""The run's folder: nothing is overwritten silently, and a run goes on from a checkpoint only when it is asked to."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from pegbox.errors import did_you_mean, fail
from pegbox.types import Checkpoint, CheckpointStore

RECORD = "run.json"
"""What marks a folder as a run's: the owner of `run_training` writes it before the first step."""


def claim(folder: Path, resume: str | None) -> None:
    """Refuse an output folder that already holds a run (unless it is to be resumed) or anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.glob("[!.]*"))):
        if resume not in (None, "auto"):
            raise fail("resume-nothing", resume=resume, folder=folder)
    elif not (folder / RECORD).is_file():
        problem = "holds other files" if folder.is_dir() else "is a file"
        raise fail("output-foreign", folder=folder, problem=problem, free=_free_name(folder))
    elif resume is None:
        raise fail("output-taken", folder=folder, free=_free_name(folder))


def _free_name(folder: Path) -> str:
    return str(next(path for n in count(2) if not (path := folder.with_name(f"{folder.name}-{n}")).exists()))


def resume_point(store: CheckpointStore, resume: str | None) -> Checkpoint | None:
    """The checkpoint that `resume` names; None starts from the beginning."""
    checkpoints = {checkpoint.path.name: checkpoint for checkpoint in store.list()}
    if resume in (None, "auto"):
        return list(checkpoints.values())[-1] if resume and checkpoints else None
    if resume not in checkpoints:
        raise fail("resume-missing", resume=resume, hint=did_you_mean(resume, checkpoints, "Complete checkpoints:"))
    return checkpoints[resume]
