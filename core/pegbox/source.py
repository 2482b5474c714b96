"""Reading configs: YAML with the line of every key, `extends`, recipes, and `key=value` overrides.

A config is read into a `Layer`: plain data beside the origin of every key. Layers are merged (mappings deeply, lists as
a whole) in the order extended file, file, command line. The YAML dialect is 1.2's core: only true and false are
booleans (`no` is a word) and `2e-4` is a number; a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from pegbox.discovery import discover, only
from pegbox.errors import did_you_mean, fail

KeyPath = tuple[str | int, ...]
RECIPE = "recipe://"


@dataclass
class Layer:
    """Config data, and where every key path in it came from: `train.yaml:7`, `command line`, or `python`."""

    data: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """The origin of a key, or of the nearest key above it that has one."""
        known = (self.origins.get(path[:length]) for length in range(len(path), -1, -1))
        return next(filter(None, known), "default")

    def merge(self, above: Layer) -> Layer:
        """This layer with `above` laid over it: mappings key by key, everything else as a whole."""
        merged = Layer(deepcopy(self.data), dict(self.origins))
        merged._lay((), merged.data, above.data, above.origins)
        return merged

    def _lay(self, path: KeyPath, below: Any, above: dict[Any, Any], origins: Mapping[KeyPath, str]) -> None:
        for key, value in above.items():
            inner = (*path, key)
            if isinstance(below, list) and key not in range(len(below)):
                place = {"above": dotted(path), "origin": origins[inner], "count": len(below)}
                raise fail("override-place", key=dotted(inner), **place)
            old = below.get(key) if isinstance(below, dict) else below[key]
            numbered = isinstance(value, dict) and value and all(isinstance(part, int) for part in value)
            if isinstance(value, dict) and (isinstance(old, dict) or (isinstance(old, list) and numbered)):
                self._lay(inner, old, value, origins)
                continue
            below[key] = deepcopy(value)
            kept = {known: origin for known, origin in self.origins.items() if known[: len(inner)] != inner}
            self.origins = kept | {known: origin for known, origin in origins.items() if known[: len(inner)] == inner}


def leaves(path: KeyPath, value: Any, *, branches: bool = False) -> Iterator[tuple[KeyPath, Any]]:
    """Every innermost value below a key path; with `branches` also what holds them."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    if branches or not pairs:
        yield path, value
    for key, inner in pairs:
        yield from leaves((*path, key), inner, branches=branches)


def dotted(path: KeyPath) -> str:
    """`data.train.0.path`, as overrides write it."""
    return ".".join(str(part) for part in path)


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> tuple[Layer, Path]:
    """Read a config with everything it extends and the overrides on top: the layer, and the folder paths start from."""
    if isinstance(source, Mapping):
        layer, folder = _extended(_layer(deepcopy(dict(source)), "python"), Path.cwd(), ())
    else:
        layer, folder = _read_named(str(source), Path.cwd(), "command line", ())
    for override in overrides:
        path, value = parse_override(override)
        for part in reversed(path):
            value = {part: value}
        layer = layer.merge(_layer(value, "command line"))
    return layer, folder


def _layer(data: dict[str, Any], origin: str) -> Layer:
    return Layer(data, dict.fromkeys((path for path, _ in leaves((), data, branches=True)), origin))


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """`lora.r=8` as a key path and a value with the same types as in YAML."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key.strip()):
        raise fail("override-form", text=text)
    path = tuple(int(part) if part.isdecimal() else part for part in key.strip().split("."))
    return path, _value(value, f"override '{text}'", Layer())


def _read_named(name: str, folder: Path, origin: str, seen: tuple[str, ...]) -> tuple[Layer, Path]:
    path = _recipe_path(name) if name.startswith(RECIPE) else folder / Path(name).expanduser()
    label = name if name.startswith(RECIPE) else _short(path)
    if label in seen:
        raise fail("extends-itself", name=label, chain=" -> ".join([*seen, label]))
    if not path.is_file():
        near = [other.name for other in (path if path.is_dir() else path.parent).glob("*.y*ml")]
        problem = "is a folder" if path.is_dir() else "does not exist"
        hint = did_you_mean(path.name, near, "Configs there:")
        raise fail("config-missing", name=label, problem=problem, origin=origin, hint=hint)
    layer = parse(path.read_bytes(), label)
    if isinstance(start := layer.data.get("paths_from"), str):
        layer.data["paths_from"] = str((path.parent / Path(start).expanduser()).resolve())
    return _extended(layer, path.parent, (*seen, label))


def _extended(layer: Layer, folder: Path, seen: tuple[str, ...]) -> tuple[Layer, Path]:
    if "extends" not in layer.data:
        return layer, folder
    origin, extends = layer.origin(("extends",)), layer.data.pop("extends")
    if not isinstance(extends, str):
        raise fail("extends-form", value=extends, origin=origin)
    merged = _read_named(extends, folder, origin, seen)[0].merge(layer)
    merged.origins[()] = layer.origin(())
    return merged, folder


def _recipe_path(name: str) -> Path:
    """The file of `recipe://name`: an entry point in the group `pegbox.recipes` with the value `package:file.yaml`."""
    from importlib.util import find_spec

    recipes, wanted = discover("pegbox.recipes"), name.removeprefix(RECIPE)
    package, _, file = (only(wanted, recipes[wanted], "recipe").value if wanted in recipes else "").partition(":")
    spec = find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        raise fail("recipe-missing", name=wanted, hint=did_you_mean(wanted, recipes, "Installed recipes:"))
    return Path(spec.submodule_search_locations[0]) / file


def parse(text: str | bytes, label: str) -> Layer:
    """Parse YAML text into a layer; `label` names the file in messages."""
    layer = Layer(origins={(): label})
    layer.data = _value(text, label, layer) or {}
    if not isinstance(layer.data, dict):
        raise fail("config-no-mapping", name=label)
    return layer


def _value(text: str | bytes, label: str, layer: Layer) -> Any:
    """The value that YAML text stands for; the origins of what is in it go into `layer`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _build(node, (), layer, label, _Loader(""))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{label}:{mark.line + 1}" if mark else label
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise fail("config-no-yaml", where=where, problem=problem) from error


def _build(node: yaml.Node, path: KeyPath, layer: Layer, label: str, loader: _Loader) -> Any:
    layer.origins.setdefault(path, f"{label}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, index), layer, label, loader) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key, origin = loader.construct_scalar(key_node), f"{label}:{key_node.start_mark.line + 1}"
        if key in result:
            raise fail("key-twice", key=dotted((*path, key)), origin=origin)
        layer.origins[(*path, key)] = origin
        result[key] = _build(value_node, (*path, key), layer, label, loader)
    return result


class _Loader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
    yaml_constructors: ClassVar[dict[str | None, Any]] = {None: yaml.SafeLoader.construct_undefined}


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _regex, _first in (
    ("str", "", ""),  # never implied by its look: what nothing else matches is a word
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?[0-9]+", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_regex})$"), list(_first))
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", getattr(yaml.SafeLoader, f"construct_yaml_{_tag}"))
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def _short(path: Path) -> str:
    """A path as a person in the current folder would write it."""
    resolved, here = path.resolve(), Path.cwd()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)
