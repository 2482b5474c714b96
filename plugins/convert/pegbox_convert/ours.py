"""What Pegbox's own config looks like here: sections and defaults of the plugins that are installed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pegbox.discovery import discover, load
from pegbox.section import Section
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

ABSENT = object()
"""There is no such default, or nobody knows."""

ORDER = (
    *("hf", "templates", "data", "packing", "bnb", "freeze", "lora", "relora", "neftune", "activations", "compile"),
    *(
        "fsdp",
        "chunked-cross-entropy",
        "reference",
        "sft",
        "dft",
        "dpo",
        "kto",
        "orpo",
        "simpo",
        "cpo",
        "reward",
        "prm",
    ),
    *("grpo", "rollout-hf", "rollout-vllm", "reward-functions", "reward-model"),
    *("router-loss", "optim", "bnb-optim", "schedule-free"),
    *("torchao-optim", "pytorch-optimizer", "trainer", "early-stopping", "samples", "trackers", "hub"),
)
"""The plugins that a converted config can list, in the order of its list: what is first touches a thing first."""
ALWAYS = ("hf", "data", "optim", "trainer")
CORE = ("model", "plugins", "output", "seed", "resume", "use", "loss", "rewards")


def ordered(plugins: Container[str], draft: Mapping[str, Any]) -> list[str]:
    """The plugins of a config in the order of its list: a precomputed reference looks at the rows that kto leaves."""
    found = [name for name in ORDER if name in plugins]
    if "kto" in found and draft.get("reference", {}).get("how") == "precomputed":
        found.remove("reference")
        found.insert(found.index("kto") + 1, "reference")
    return found


@cache
def schema(plugin: str) -> type[Section] | None:
    """The section of an installed plugin; None if it has none, or is not installed."""
    installed = discover()
    if plugin not in installed:
        return None
    _, instance = load(plugin, installed, Path())
    declare = getattr(instance, "register_config", None)
    return declare().schema if declare else None


def default(path: str) -> Any:
    """The default of a key of our config, such as `trainer.micro_batch`; ABSENT if nobody knows."""
    first, *rest = path.split(".")
    model: type[BaseModel] | None
    if first in CORE:
        from pegbox.config import RunSection

        model, rest = RunSection, [first, *rest]
    else:
        model = schema(first)
    for position, name in enumerate(rest):
        if model is None or name not in model.model_fields:
            return ABSENT
        value = model.model_fields[name].default
        if position == len(rest) - 1:
            return ABSENT if value is PydanticUndefined else value
        inner = model.model_fields[name].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    return ABSENT


def same(ours: Any, value: Any) -> bool:
    """Whether a value is one of our defaults; a list is as good as a tuple."""
    if isinstance(ours, tuple) and isinstance(value, list):
        return list(ours) == value
    return (type(ours) is type(value) and ours == value) or (_number(ours) and _number(value) and ours == value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
