"""What a run's folder means for a conversation: whether it was exported, and which code its config trusts."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from pegbox.errors import UserError

RECORD, CONFIG = "run.json", "config.yaml"
ADAPTER = "adapter_config.json"
EXPORTED = (ADAPTER, "config.json")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "SEQ_CLS", "TOKEN_CLS")
"""What folders of transformers and of PEFT say of models without a language head."""
OF_THE_BASE = ("config_overrides", "rope_scaling", "text_only")
"""Settings of `hf` that made the base what the adapter was trained on; a whole model carries them in its own config."""


def config_for(name: str) -> dict[str, object]:
    """The config that loads a run or a model.

    Args:
        name: a run's folder, or what `model.name` may be.

    Raises:
        UserError: the run was not exported, or what it made gives numbers.
    """
    folder = Path(name).expanduser()
    settings: dict[str, object] = {}
    if (folder / RECORD).is_file():
        _require_export(folder)
        settings = _settings(folder)
    _require_words(folder)
    here = str(folder.resolve()) if folder.exists() else name
    trusted = [*settings.get("trust_remote_code", ()), here] if settings.get("trust_remote_code") else []  # type: ignore[misc]
    base = {key: settings[key] for key in OF_THE_BASE if settings.get(key)} if (folder / ADAPTER).is_file() else {}
    return {"model": {"name": here}, "plugins": ["hf"], "hf": {"trust_remote_code": trusted, **base}}


def _require_export(folder: Path) -> None:
    if any((folder / file).is_file() for file in EXPORTED):
        return
    raise UserError(
        f"the run {folder} has no model yet",
        "A run exports its model when training ends; this one is still training, was interrupted, or failed.",
        f"Go on with it: pegbox run {folder / CONFIG} resume=auto",
    )


def _require_words(folder: Path) -> None:
    for file, key in (("config.json", "architectures"), (ADAPTER, "task_type")):
        path = folder / file
        said = str(json.loads(path.read_text(encoding="utf-8")).get(key)) if path.is_file() else ""
        if any(mark in said for mark in CLASSIFIERS):
            raise UserError(
                f"{folder} gives numbers and no words",
                f"It is a model that classifies, such as a reward model: {file} says {said}.",
                "Score completions with it: the plugin reward-model. To talk, name a language model.",
            )


def _settings(folder: Path) -> dict[str, object]:
    file = folder / CONFIG
    written = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    section = written.get("hf") if isinstance(written, dict) else None
    return section if isinstance(section, dict) else {}
