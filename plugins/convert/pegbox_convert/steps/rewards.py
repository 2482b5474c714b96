"""Rewards of online methods: functions by their import path, reward models, and what each weighs."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.places import place
from pegbox_convert.values import names, quiet

Entry = dict[str, Any]
OF_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward")
"""Reward functions that TRL's command knows by name."""
OVERLONG: Entry = {
    "use": "length",
    "name": "get_soft_overlong_punishment",
    "options": {"max_tokens": 1280, "soft_tokens": 256},
}
REGISTRY = (
    " is a name in Oumi's registry: write reward-functions: {functions: [module:function]}; they are called as TRL's"
)
COLUMNS = "columns that they read must be named in data.columns; all are passed on there"


def rewards(c: Conversion) -> None:
    """The sections `reward-functions` and `reward-model`, and the weights."""
    listed = c.get("reward_funcs")
    functions: list[str | Entry] = []
    models: list[Entry] = []
    scores: list[str] = []
    for one in [] if quiet(listed) else names(listed):
        if c.table.name == "oumi" and "." not in one and "/" not in one:
            c.later("reward_funcs", f"{one}{REGISTRY}")
        elif ".py:" in one:
            scores.append(_of_file(functions, one, scores, c))
        elif "/" in one or ("." not in one and one not in (*OF_TRL, OVERLONG["name"])):
            scores.append(_model(models, one))
        else:
            scores.append(_function(functions, one, scores))
    among = bool(models)
    if not quiet(c.get("reward_model_name_or_path")):
        scores.insert(0, _model(models, str(c.get("reward_model_name_or_path"))))
    if functions:
        known = _columns(c)
        note = "" if known else COLUMNS
        c.put("reward-functions.functions", functions, "reward_funcs", note=note, differs=not known)
        if c.get("reward_num_workers") is not None:
            c.put("reward-functions.workers", c.get("reward_num_workers", "whole"), "reward_num_workers")
    if models:
        c.put("reward-model.models", models, "reward_model_name_or_path", *(["reward_funcs"] if among else []))
    _weights(c, scores)


def _function(functions: list[str | Entry], written: str, taken: list[str]) -> str:
    """One function, and the name of its score."""
    if written == OVERLONG["name"]:
        functions.append(OVERLONG)
        return written
    module, _, name = (f"trl.rewards.{written}" if written in OF_TRL else written).replace(":", ".").rpartition(".")
    return _named(functions, f"{module}:{name}", f"{module.replace('.', '-')}-{name}", taken)


def _of_file(functions: list[str | Entry], written: str, taken: list[str], c: Conversion) -> str:
    """One function of a file, `./rewards.py:right`, and the name of its score."""
    file, _, name = written.rpartition(":")
    return _named(functions, f"{place(file, c.folder)}:{name}", f"{PurePath(file).stem}-{name}", taken)


def _named(functions: list[str | Entry], use: str, longer: str, taken: list[str]) -> str:
    """A function is named as it is, or by a longer name if another one has this name already."""
    name = use.rpartition(":")[2]
    functions.append(use if name not in taken else {"use": use, "name": longer})
    return name if name not in taken else longer


def _model(models: list[Entry], name: str) -> str:
    models.append({"name": name})
    return f"reward-model/{name.rstrip('/').rsplit('/', 1)[-1]}"


def _weights(c: Conversion, scores: list[str]) -> None:
    weights = c.get("reward_weights")
    if quiet(weights):
        return
    listed = weights if isinstance(weights, list) else [weights]
    if len(listed) != len(scores):
        c.later("reward_weights", f"{len(listed)} weights for {len(scores)} rewards: write rewards: {{name: weight}}")
        return
    c.put("rewards", dict(zip(scores, map(float, listed), strict=True)), "reward_weights")


def _columns(c: Conversion) -> bool:
    """Keep the columns that a local file has beside the prompt; whether they are known."""
    found = c.columns
    if found:
        c.put("data.columns", sorted(found))
    return bool(found)
