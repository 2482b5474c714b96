"""Merging `configure_` records, field by field: two values for one field are an error that names both plugins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pegbox.errors import fail
from pegbox.types import GroupOptions, Model, ModelOptions, ParameterGroup


def merge_options(answers: Sequence[tuple[str, ModelOptions]]) -> ModelOptions:
    """The one request that all plugins make of the model."""
    return ModelOptions(**_merged(answers, "of the model"))


def merge_groups(model: Model, answers: Sequence[tuple[str, Sequence[GroupOptions]]]) -> list[ParameterGroup]:
    """The trainable parameters of a model, grouped by their merged options; every parameter is in exactly one group."""
    records = [(plugin, option) for plugin, options in answers for option in options]
    groups: dict[GroupOptions, list[str]] = {}
    idle = set(records)
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad:
            matching = [record for record in records if re.search(record[1].pattern, name)]
            idle.difference_update(matching)
            groups.setdefault(GroupOptions(pattern="", **_merged(matching, f"of parameter {name}")), []).append(name)
    for plugin, option in idle:
        raise fail("group-idle", plugin=plugin, pattern=option.pattern)
    return [ParameterGroup(names=tuple(names), options=options) for options, names in groups.items()]


def _merged(records: Sequence[tuple[str, Any]], whose: str) -> dict[str, Any]:
    """The fields that any record sets, each with its one value."""
    merged: dict[str, tuple[str, Any]] = {}
    for plugin, record in records:
        for name in (item.name for item in fields(record) if item.name != "pattern"):
            said = plugin, getattr(record, name)
            if said[1] is not None and (first := merged.setdefault(name, said))[1] != said[1]:
                raise fail("records-clash", field=f"'{name}' {whose}", first=first, second=said)
    return {name: value for name, (_, value) in merged.items()}
