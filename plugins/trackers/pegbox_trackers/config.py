"""The section `trackers` of a config: one section inside it for each tracker that is used."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator


class TensorboardOptions(Section):
    """TensorBoard event files."""

    folder: str = setting("tensorboard", "Where event files go; a relative path starts at the run's folder.")
    flush_s: int = setting(120, "How often events that wait are written.", unit="seconds", ge=1)


class WandbOptions(Section):
    """Weights & Biases. The key comes from `wandb login`."""

    project: str = setting("pegbox", "Project that the run belongs to.", min_length=1)
    name: str | None = setting(None, "Name of the run; that of the output folder unless set.")
    entity: str | None = setting(None, "User or team that owns the project; your default unless set.")
    group: str | None = setting(None, "Group that the run is shown in.")
    job_type: str | None = setting(None, "Kind of run within its group.")
    tags: tuple[str, ...] = setting((), "Tags of the run.")
    notes: str | None = setting(None, "Longer description of the run.")
    mode: Literal["online", "offline", "disabled"] = setting(
        "online", "Send figures, keep them in the run's folder for `wandb sync`, or neither."
    )


class MlflowOptions(Section):
    """MLflow."""

    experiment: str = setting("pegbox", "Experiment that the run belongs to.", min_length=1)
    name: str | None = setting(None, "Name of the run; that of the output folder unless set.")
    tracking_uri: str | None = setting(None, "Server or store; MLflow's own choice unless set.")
    tags: dict[str, str] = setting({}, "Tags of the run.")
    description: str | None = setting(None, "Longer description of the run.")


class CometOptions(Section):
    """Comet. The key comes from `comet login`."""

    project: str = setting("pegbox", "Project that the experiment belongs to.", min_length=1)
    name: str | None = setting(None, "Name of the experiment; that of the output folder unless set.")
    workspace: str | None = setting(None, "Workspace of the project; your default unless set.")
    tags: tuple[str, ...] = setting((), "Tags of the experiment.")
    online: bool = setting(True, "Send figures; false keeps them in the run's folder for `comet upload`.")


class SwanlabOptions(Section):
    """SwanLab. The key comes from `swanlab login`."""

    project: str = setting("pegbox", "Project that the experiment belongs to.", min_length=1)
    name: str | None = setting(None, "Name of the experiment; that of the output folder unless set.")
    workspace: str | None = setting(None, "User or organization that owns the project; your default unless set.")
    description: str | None = setting(None, "Longer description of the experiment.")
    tags: tuple[str, ...] = setting((), "Tags of the experiment.")
    mode: Literal["online", "local", "offline", "disabled"] = setting(
        "online", "Send figures, keep them for the local board, keep them for `swanlab sync`, or neither."
    )


class TrackioOptions(Section):
    """Trackio."""

    project: str = setting("pegbox", "Project that the run belongs to.", min_length=1)
    name: str | None = setting(None, "Name of the run; that of the output folder unless set.")
    group: str | None = setting(None, "Group that the run is shown in.")
    space_id: str | None = setting(None, "Hub space that the figures are synchronized with; local unless set.")


class TrackersConfig(Section):
    """Which trackers follow the run; `{}` uses one with its defaults."""

    tensorboard: TensorboardOptions | None = setting(None, "Write TensorBoard event files.")
    wandb: WandbOptions | None = setting(None, "Report to Weights & Biases.")
    mlflow: MlflowOptions | None = setting(None, "Report to MLflow.")
    comet: CometOptions | None = setting(None, "Report to Comet.")
    swanlab: SwanlabOptions | None = setting(None, "Report to SwanLab.")
    trackio: TrackioOptions | None = setting(None, "Report to Trackio.")

    @model_validator(mode="after")
    def _some(self) -> TrackersConfig:
        if not self.chosen():
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"no tracker is chosen; write for example tensorboard: {{}} (there are {names})")
        return self

    def chosen(self) -> tuple[str, ...]:
        """Names of the trackers that are used."""
        return tuple(name for name in type(self).model_fields if getattr(self, name) is not None)
