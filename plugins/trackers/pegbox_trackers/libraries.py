"""The six libraries: how each is found, started, continued after a stop, and told that a run failed.

accelerate's tracker classes do the logging; what they do not cover (going on with a run, a run that failed) is here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from pegbox_trackers.config import (
        CometOptions,
        MlflowOptions,
        SwanlabOptions,
        TensorboardOptions,
        TrackersConfig,
        TrackioOptions,
        WandbOptions,
    )


@dataclass(frozen=True)
class Start:
    """What a tracker is started with.

    Attributes:
        folder: the run's.
        step: the step that the run begins after.
        known: the id of the tracker's run that is continued, None begins a new one.
    """

    folder: Path
    step: int
    known: str | None


@dataclass(frozen=True)
class Library:
    """One tracker.

    Attributes:
        module: what must be importable.
        make: accelerate's tracker, not yet started.
        run_id: what names the tracker's run, once it is started.
        fail: tell the tracker that the run failed, in place of `finish`.
    """

    module: str
    make: Callable[[Any, Start], GeneralTracker]
    run_id: Callable[[Any], str | None]
    fail: Callable[[Any], None] | None = None


def require_libraries(config: TrackersConfig) -> None:
    """Raise unless every chosen tracker is installed; nothing is imported.

    Raises:
        ConfigError: with the pip line.
    """
    missing = [name for name in config.chosen() if importlib.util.find_spec(LIBRARIES[name].module) is None]
    if missing:
        raise ConfigError(
            f"trackers.{missing[0]}: the package '{LIBRARIES[missing[0]].module}' is not installed",
            "The run would not be tracked.",
            f"Type: pip install 'pegbox-trackers[{','.join(missing)}]'",
        )


def _name(options: Any, start: Start) -> str:
    return options.name or start.folder.name


def _given(**values: object) -> dict[str, Any]:
    """The arguments that say something."""
    return {key: value for key, value in values.items() if value not in (None, (), {}, [])}


def _tensorboard(options: TensorboardOptions, start: Start) -> GeneralTracker:
    from accelerate.tracking import TensorBoardTracker

    # What was logged after the checkpoint that the run goes on from is hidden.
    purge = {"purge_step": start.step + 1} if start.known is not None else {}
    return TensorBoardTracker("", start.folder / options.folder, flush_secs=options.flush_s, **purge)


def _wandb(options: WandbOptions, start: Start) -> GeneralTracker:
    from accelerate.tracking import WandBTracker

    further = _given(
        entity=options.entity,
        group=options.group,
        job_type=options.job_type,
        tags=list(options.tags),
        notes=options.notes,
        id=start.known,
        resume="allow" if start.known else None,
    )
    return WandBTracker(
        options.project, name=_name(options, start), dir=str(start.folder), mode=options.mode, **further
    )


def _mlflow(options: MlflowOptions, start: Start) -> GeneralTracker:
    import mlflow
    from accelerate.tracking import MLflowTracker

    if options.tracking_uri is not None:
        mlflow.set_tracking_uri(options.tracking_uri)
    return MLflowTracker(
        experiment_name=options.experiment,
        run_id=start.known,
        tags=dict(options.tags) or None,
        run_name=_name(options, start),
        description=options.description if start.known is None else None,
    )


def _fail_mlflow(_: GeneralTracker) -> None:
    import mlflow

    mlflow.end_run("FAILED")


def _comet(options: CometOptions, start: Start) -> GeneralTracker:
    import comet_ml
    from accelerate.tracking import CometMLTracker

    config = comet_ml.ExperimentConfig(
        log_code=False, name=_name(options, start), tags=list(options.tags), offline_directory=str(start.folder)
    )
    further = _given(workspace=options.workspace, experiment_key=start.known)
    mode = "get_or_create" if start.known else "create"
    return CometMLTracker(options.project, online=options.online, mode=mode, experiment_config=config, **further)


def _swanlab(options: SwanlabOptions, start: Start) -> GeneralTracker:
    from accelerate.tracking import SwanLabTracker

    further = _given(
        workspace=options.workspace,
        description=options.description,
        tags=list(options.tags),
        id=start.known,
        resume="allow" if start.known else None,
    )
    logs = str(start.folder / "swanlab")
    return SwanLabTracker(options.project, name=_name(options, start), mode=options.mode, log_dir=logs, **further)


def _trackio(options: TrackioOptions, start: Start) -> GeneralTracker:
    from accelerate.tracking import TrackioTracker

    further = _given(group=options.group, space_id=options.space_id, resume="must" if start.known else None)
    return TrackioTracker(options.project, name=start.known or _name(options, start), **further)


LIBRARIES = {
    "tensorboard": Library("tensorboard", _tensorboard, lambda tracker: str(tracker.logging_dir)),
    "wandb": Library("wandb", _wandb, lambda tracker: tracker.run.id, lambda tracker: tracker.run.finish(exit_code=1)),
    "mlflow": Library("mlflow", _mlflow, lambda tracker: tracker.active_run.info.run_id, _fail_mlflow),
    "comet": Library("comet_ml", _comet, lambda tracker: tracker.writer.get_key()),
    "swanlab": Library("swanlab", _swanlab, lambda tracker: getattr(tracker.run, "id", None)),
    "trackio": Library("trackio", _trackio, lambda tracker: tracker.run.name),
}
