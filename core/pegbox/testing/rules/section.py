"""A plugin's section of the config."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from pegbox.section import Section
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject

UNKNOWN = "no_such_setting"


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every pydantic model that an annotation mentions, with the models in their fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for argument in get_args(annotation):
        yield from models(argument)


def validated(subject: Subject, schema: type[Section]) -> Section:
    """The section that the test's config gives."""
    try:
        return schema.model_validate_json(json.dumps(dict(subject.config)))
    except ValidationError as error:
        raise RuleBroken(
            f"the config of the test, {dict(subject.config)}, is no section '{subject.plugin}': {error}",
            "The other rules look at a section that is valid.",
            "Set `config` in the conformance class to a section as a user would write it.",
        ) from error


def is_frozen(subject: Subject) -> None:
    """No setting can be changed after the config was read, nor in a section inside it."""
    schema = subject.schema()
    for model in models(schema):
        require(
            bool(model.model_config.get("frozen")),
            f"{model.__name__} is not frozen",
            "The plan shows the config that every part of the run reads; a part that changes it makes the plan wrong.",
            "Derive it from pegbox.section.Section and leave its model_config alone.",
        )


def refuses_unknown_keys(subject: Subject) -> None:
    """A misspelt setting is an error, also in a section inside the section."""
    schema = subject.schema()
    if schema is None:
        return
    why = "A misspelt setting that is ignored gives a run that is not the one that was asked for."
    fix = "Derive it from pegbox.section.Section and leave its model_config alone."
    try:
        schema.model_validate_json(json.dumps({**subject.config, UNKNOWN: 1}))
        kinds: set[str] = set()
    except ValidationError as error:
        kinds = {detail["type"] for detail in error.errors()}
    require("extra_forbidden" in kinds, f"{schema.__name__} accepts the unknown key '{UNKNOWN}'", why, fix)
    for model in models(schema):
        forbids = model.model_config.get("extra") == "forbid"
        require(forbids, f"{model.__name__}, inside {schema.__name__}, accepts unknown keys", why, fix)


def documents_every_setting(subject: Subject) -> None:
    """Every setting says what it does, also in a section inside the section."""
    schema = subject.schema()
    silent = [
        f"{model.__name__}.{name}"
        for model in models(schema)
        for name, field in model.model_fields.items()
        if not (field.description or "").strip()
    ]
    require(
        not silent,
        f"these settings have no documentation: {', '.join(silent)}",
        "Error messages, reference pages and editors show this text and nothing else.",
        'Declare each with setting(default, "One sentence.", unit="...") from pegbox.section.',
    )


def comes_back_from_json(subject: Subject) -> None:
    """The section written as JSON and read again is the same section: the run's folder keeps it in this form."""
    schema = subject.schema()
    if schema is None:
        return
    section = validated(subject, schema)
    why = "A run keeps its resolved config as plain data, and a run that is resumed or repeated reads it back."
    fix = "Use types that JSON has: numbers, strings, booleans, lists, mappings, sections; no serializers of your own."
    try:
        text = json.dumps(section.model_dump(mode="json"), allow_nan=False)
        again = schema.model_validate_json(text)
    except (ValueError, TypeError) as error:
        raise RuleBroken(f"{schema.__name__} cannot be written and read back: {error}", why, fix) from error
    require(again == section, f"{schema.__name__} comes back as {again!r}, but was {section!r}", why, fix)


def has_a_schema(subject: Subject) -> None:
    """The JSON schema can be made, and says the same each time."""
    schema = subject.schema()
    if schema is None:
        return
    require(
        issubclass(schema, Section),
        f"{schema.__name__} is no pegbox.section.Section",
        "The kernel reads every section with the same strictness.",
        "Derive it from pegbox.section.Section.",
    )
    why = "Editors and reference pages are made from the schema."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            first, second = (json.dumps(schema.model_json_schema(), sort_keys=True) for _ in range(2))
    except Exception as error:
        raise RuleBroken(
            f"{schema.__name__} has no JSON schema: {error}", why, "Use types and defaults that JSON has."
        ) from error
    require(
        first == second,
        f"the JSON schema of {schema.__name__} changes from one call to the next",
        why,
        "Make it constant.",
    )
