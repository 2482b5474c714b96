"""The section `reward-model` of a config."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pegbox.errors import ConfigError
from pegbox.section import Section, setting
from pydantic import model_validator

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox.context import Context

PLUGIN = "reward-model"
LANGUAGE = "language"
KINDS = {
    "outcome": ("ForSequenceClassification", "SEQ_CLS"),
    "process": ("ForTokenClassification", "TOKEN_CLS"),
    LANGUAGE: ("ForCausalLM", "CAUSAL_LM"),
}
"""What folders of transformers and of PEFT say of such models."""
FOR_STEPS = ("step_separator", "steps", "label")


class JudgeEntry(Section):
    """One reward model."""

    name: str = setting(
        ..., "Folder of a run or of a model (a relative path starts at the config's folder), or hub name.", min_length=1
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub repository.")
    score: str | None = setting(
        None,
        "The score is called `reward-model/<score>`; the last part of `name` if not set.",
        pattern=r"^[\w.-]+$",
    )
    kind: Literal["outcome", "process"] = setting(
        "outcome", "`outcome`: one number for an answer (plugin reward); `process`: one for each step (plugin prm)."
    )
    dtype: str | None = setting(None, "Data type of the weights, as `model.dtype`; that one if not set.")
    max_length: int | None = setting(
        None, "Longer texts lose tokens at their beginning, so that what is scored stays.", unit="tokens", ge=1
    )
    step_separator: str = setting("\n", "What stands between the steps of an answer; it must be one token.")
    steps: Literal["min", "mean", "last", "product"] = setting(
        "min", "What becomes of the probabilities that steps are right."
    )
    label: int = setting(1, "The label of a token classifier that means right.", ge=0, le=1)

    @model_validator(mode="after")
    def _steps_are_judged(self) -> JudgeEntry:
        idle = [name for name in FOR_STEPS if getattr(self, name) != type(self).model_fields[name].default]
        if idle and self.kind == "outcome":
            raise ValueError(f"{idle[0]} is set, but kind is outcome: it would do nothing; set kind: process")
        return self

    @property
    def score_name(self) -> str:
        """The name of its score."""
        return f"{PLUGIN}/{self.score or self.name.rstrip('/').rsplit('/', 1)[-1]}"


class RewardModelConfig(Section):
    """Reward models that score completions, each under a name of its own, which `rewards` may weigh."""

    models: tuple[JudgeEntry, ...] = setting(..., "The models, at least one.", min_length=1)
    micro_batch: int = setting(16, "Completions in one forward.", unit="rows", ge=1)
    prompt: str = setting(
        "prompt",
        "Column of the prompts' rows that holds messages, if it does: they are rendered with the reward model's own "
        "chat template.",
        min_length=1,
    )

    @model_validator(mode="after")
    def _names_differ(self) -> RewardModelConfig:
        names = [model.score_name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two models have the score {twice[0]}; set score of one of them")
        return self


def require_there(ctx: Context, wanted: JudgeEntry) -> None:
    """Raise if a name that is a path leads nowhere, or to a folder of another kind.

    Raises:
        ConfigError: naming the folder.
    """
    folder = ctx.config.path(wanted.name)
    found = kind_of(folder)
    if found == LANGUAGE:
        raise ConfigError(
            f"'{wanted.name}' is a language model, and has no head that was trained to judge",
            "As a reward model its predictions would be random numbers.",
            "Name a model that was trained to classify, such as the folder of a run with reward or prm.",
        )
    if found not in (None, wanted.kind):
        raise ConfigError(
            f"the reward model '{wanted.name}' is of the kind {found}, and its entry says {wanted.kind}",
            "An outcome model gives one number for an answer (plugin reward), a process model one for each step (prm).",
            f"Set kind: {found}, or name another folder.",
        )
    if wanted.name.startswith((".", "/", "~")) and not folder.is_dir():
        raise ConfigError(
            f"reward-model.models names '{wanted.name}', but {folder} is no folder",
            "A reward model is the folder that its training left, or a name on the hub.",
            "Correct the name; a relative path starts at the config's folder.",
        )


def kind_of(folder: Path) -> str | None:
    """What a local folder says that it predicts; None if it does not say."""
    for file, key in (("config.json", "architectures"), ("adapter_config.json", "task_type")):
        try:
            said = str(json.loads((folder / file).read_text(encoding="utf-8"))[key])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for kind, marks in KINDS.items():
            if any(mark in said for mark in marks):
                return kind
    return None
