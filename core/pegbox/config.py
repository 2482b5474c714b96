"""The resolved config: the core's own keys, one section per active plugin, and the origin of every key.

Mistakes teach: each error says what is wrong and where (file and line), names what was probably meant, and says what to
type.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from pegbox.discovery import Installed
from pegbox.errors import PegboxError, did_you_mean, fail
from pegbox.record import Record
from pegbox.section import S, Section, setting
from pegbox.source import KeyPath, Layer, dotted, leaves

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Weight = Annotated[float, Field(allow_inf_nan=False)]


class ModelSection(Section):
    """Which model the run starts from."""

    name: str = setting(..., "Local folder, hub name, or what else the owner of load_model understands.", min_length=1)
    revision: str | None = setting(None, "Branch, tag or commit of a hub repository.")
    dtype: Dtype = setting("auto", "Data type of the frozen weights; auto: the checkpoint's; without a GPU float32.")
    format: str = setting("transformers", "Which format to load; its owner is the plugin that declares it.")


class RunSection(Section):
    """The keys of the core; every other key of a config is the name of a plugin."""

    model: ModelSection = setting(..., "The model that the run starts from.")
    plugins: tuple[str, ...] = setting((), "Active plugins, by name or as ./file.py; their order is the call order.")
    output: str = setting("runs/default", "Folder of the run; relative to the current folder.", min_length=1)
    paths_from: str | None = setting(None, "Folder where relative paths of inputs start; unset: the config's own.")
    seed: int = setting(0, "Seed of all randomness of the run.", ge=0)
    resume: str | None = setting(None, "`auto` goes on from the latest checkpoint in `output`; or a checkpoint's name.")
    use: dict[str, str] = setting({}, "Which plugin owns a hook when several could: `{hook: plugin}`.")
    loss: dict[str, Weight] = setting({}, "Weights of several losses by plugin: `{dpo: 1.0, sft: 0.1}`.")
    rewards: dict[str, Weight] = setting({}, "Weights of rewards by name.")


CORE_KEYS = tuple(RunSection.model_fields)


class Config(Record):
    """The resolved config of one run.

    Attributes:
        run: the core's keys.
        sections: the validated section of each active plugin that has one, by plugin name.
        folder: where relative paths of input files in the config start: `paths_from`, or the config file's folder.
    """

    run: RunSection
    sections: Mapping[str, Section]
    layer: Layer
    folder: Path

    def section(self, schema: type[S]) -> S:
        """The section that `schema` declares."""
        for section in self.sections.values():
            if isinstance(section, schema):
                return section
        raise fail("section-undeclared", schema=schema.__name__)

    def path(self, written: str | Path) -> Path:
        """A path as written in the config, resolved against the config's folder."""
        return (self.folder / Path(written).expanduser()).resolve()

    def resolved(self) -> dict[str, Any]:
        """Plain data that gives the same run when read as a config from the same folder."""
        sections = {name: section.model_dump(mode="json") for name, section in self.sections.items()}
        return {**self.run.model_dump(mode="json"), **sections}

    def record(self, folder: Path) -> dict[str, Any]:
        """Plain data that gives the same run when read from a file in `folder`, wherever that is done."""
        return {**self.resolved(), "paths_from": os.path.relpath(self.folder.resolve(), folder.resolve())}

    def origins(self) -> Iterator[tuple[str, Any, str]]:
        """Every resolved key with its value and where it came from, in order."""
        for path, value in leaves((), self.resolved()):
            yield dotted(path), value, self.layer.origins.get(path, "default")


def read_sections(
    layer: Layer, schemas: Mapping[str, type[Section]], active: list[str], installed: Mapping[str, list[Installed]]
) -> dict[str, Section]:
    """Validate every plugin's section; a key that is neither the core's nor an active plugin's is an error."""
    for key in (key for key in layer.data if key not in (*CORE_KEYS, *schemas)):
        origin = layer.origin((key,))
        if key in active or key in installed:
            raise fail("section-of-none" if key in active else "section-inactive", key=key, origin=origin)
        hint = did_you_mean(key, [*CORE_KEYS, *installed], "Known:")
        raise fail("unknown-section", key=key, origin=origin, hint=hint)
    return {name: validate(schema, layer.data.get(name), layer, (name,)) for name, schema in schemas.items()}


def validate(schema: type[S], data: Any, layer: Layer, at: KeyPath) -> S:
    """Validate one section strictly; errors name file, line, the value seen, and what was probably meant."""
    try:
        return schema.model_validate_json(json.dumps({} if data is None else data, default=str))
    except ValidationError as error:
        # Each member of a union complains of what all of them refuse: one mistake, best said by a list of words.
        details = sorted(error.errors(include_url=False), key=lambda detail: detail["type"] == "literal_error")
        places = {_place(detail, layer, at): detail for detail in details}
    mistakes = [_explain(schema, detail, layer, path) for path, detail in places.items()]
    if len(mistakes) == 1:
        raise mistakes[0]
    raise fail("mistakes", count=len(mistakes), lines="\n".join(f"- {m}".replace("\n", "\n  ") for m in mistakes))


def _place(detail: Any, layer: Layer, at: KeyPath) -> KeyPath:
    """The key that pydantic means: what the config has of its location, to which it adds names of union members."""
    path = reduce(lambda path, part: (*path, part) if (*path, part) in layer.origins else path, detail["loc"], at)
    return (*path, detail["loc"][-1]) if detail["type"] == "missing" else path


def _explain(schema: type[BaseModel], detail: Any, layer: Layer, path: KeyPath) -> PegboxError:
    loc = detail["loc"]
    origin, (fields, doc) = layer.origin(path), _fields_at(schema, loc)
    if detail["type"] == "extra_forbidden":
        place = f"section '{dotted(path[:-1])}'" if len(path) > 1 else "the config"
        hint = did_you_mean(loc[-1], fields, "Known:")
        return fail("unknown-key", key=loc[-1], place=place, origin=origin, hint=hint)
    if detail["type"] == "missing":
        return fail("key-missing", key=dotted(path), origin=origin, doc=doc)
    if detail["type"] == "value_error":
        return fail("values-clash", place=dotted(path) or "the config", problem=detail["ctx"]["error"], origin=origin)
    problem = detail["msg"][0].lower() + detail["msg"][1:]
    hint = did_you_mean(str(detail["input"]), problem.split("'")[1::2])
    value = json.dumps(detail["input"], default=str)
    return fail("value-wrong", key=dotted(path), value=value, origin=origin, problem=problem, doc=doc, hint=hint)


def _fields_at(schema: type[BaseModel], loc: KeyPath) -> tuple[Mapping[str, FieldInfo], str]:
    """The known keys at the end of an error's location, and what the last documented key on the way means."""
    fields, doc, inside = schema.model_fields, "", [schema]
    for part in loc:
        if part in fields:
            inside, doc = list(_models(fields[str(part)].annotation)), fields[str(part)].description or doc
        named = [model for model in inside if model.__name__ == part] or inside[:1]
        fields = named[0].model_fields if named else fields
    return fields, doc


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
