"""The types that hooks pass: their words and their fields, from the modules of the core that define them."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from types import ModuleType

from pegbox import context, events, record, rollouts, rows, types

MODULES: tuple[ModuleType, ...] = (types, rows, rollouts, events, record, context)
INTRO = """# What hooks pass

Frozen, typed objects; tensors carry their shape as a suffix (the legend stands at the top of `pegbox/types.py`)."""
OPERATORS = ("__call__", "__len__", "__getitem__", "__iter__")


def documented_types() -> dict[str, type]:
    """Every public class of the modules that hooks pass objects of, by name, in the order of the files."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found[name] = value
    return found


def page() -> str:
    """All types on one page."""
    return "\n\n".join([INTRO, *(section(name) for name in documented_types())])


def section(name: str) -> str:
    """One type: where it lives, its words, its fields and methods."""
    made = documented_types()[name]
    parts = [f"## {name}", f"`{made.__module__}.{name}`", _words(made)]
    body = _members(made)
    if body:
        parts.append("```python\n" + "\n".join([f"class {name}:", *(f"    {line}" for line in body)]) + "\n```")
    return "\n\n".join(filter(None, parts))


def _words(made: type) -> str:
    """The docstring; its list of attributes as a markdown list."""
    text = inspect.cleandoc(made.__doc__ or "")
    if text.startswith(f"{made.__name__}("):
        return ""
    head, _, attributes = text.partition("Attributes:\n")
    items = [" ".join(item.split()) for item in re.split(r"\n(?=    \S)", attributes) if item.strip()]
    lines = [re.sub(r"^([\w, ]+):", lambda match: f"- **{match[1]}**:", item) for item in items]
    return "\n\n".join(filter(None, (head.strip(), "\n".join(lines))))


def _members(made: type) -> list[str]:
    if issubclass(made, Enum):
        return list(made.__members__)
    if is_dataclass(made):
        shown = [_field(item) for item in fields(made) if item.init and not item.name.startswith("_")]
        later = [f"{item.name}: {item.type}" for item in fields(made) if not item.init]
        shown += [f"{line}  # set during the run" for line in later]
    else:
        shown = [f"{name}: {kind}" for name, kind in vars(made).get("__annotations__", {}).items()]
    return shown + [_method(name, value) for name, value in vars(made).items() if _is_method(name, value)]


def _field(item: Field[object]) -> str:
    if item.default is not MISSING:
        return f"{item.name}: {item.type} = {item.default!r}"
    factory = "" if item.default_factory is MISSING else f" = {getattr(item.default_factory, '__name__', '...')}()"
    return f"{item.name}: {item.type}{factory}"


def _is_method(name: str, value: object) -> bool:
    public = not name.startswith("_") or name in OPERATORS
    return public and (inspect.isfunction(value) or isinstance(value, property | classmethod))


def _method(name: str, value: object) -> str:
    function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    assert callable(function)
    text = re.sub(r"'|\b\w+\.(?=[A-Z])", "", str(inspect.signature(function)))
    if isinstance(value, property):
        return f"{name}: {text.rpartition(' -> ')[2]}"
    return f"def {name}{text}: ..."
