"""Which functions and methods of other packages a piece of code replaced.

A patch belongs to one instance of one model. Code that assigns to a class or a module of another package changes every
model of the process, cannot be undone, and meets the next one who does the same. The fingerprint is every function and
class of the loaded modules and every method of those classes, compared by identity.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType, ModuleType

from pegbox.testing.rule import require

FOREIGN = (
    "accelerate",
    "datasets",
    "pegbox",
    "peft",
    "pluggy",
    "torch._tensor",
    "torch.autograd",
    "torch.functional",
    "torch.nn",
    "torch.optim",
    "transformers",
    "trl",
)
WATCHED = ("torch.nn", "torch.optim", "transformers.modeling_utils", "transformers.models.llama.modeling_llama")
"""Loaded before looking, where installed: what patches reach for."""
UNSTABLE = ("__pydantic", "__annotate")

CODE = (classmethod, staticmethod, property)

Fingerprint = dict[str, object]


def load_watched() -> None:
    """Import what is watched, where it is installed, and let libraries do what they do once.

    transformers adds a method to torch's Module when the first model of a process is made, so one is made.
    """
    from pegbox.testing.tiny import tiny_model

    # transformers can be there without torch, and then its models cannot be imported.
    for name in WATCHED if find_spec("torch") is not None else ():
        if find_spec(name.partition(".")[0]) is not None:
            import_module(name)
    if "transformers.modeling_utils" in sys.modules:
        tiny_model()


def fingerprint() -> Fingerprint:
    """Every function, class and method of loaded modules of other packages, by dotted name."""
    found: Fingerprint = {}
    for name, module in list(sys.modules.items()):
        if module is not None and _is_foreign(name):
            found.update(_of_module(name, module))
    return found


def _is_foreign(name: str) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in FOREIGN) and not name.startswith("pegbox.testing")


def _of_module(name: str, module: ModuleType) -> Iterator[tuple[str, object]]:
    for key, value in list(vars(module).items()):
        if isinstance(value, type | FunctionType):
            yield f"{name}.{key}", value
        if isinstance(value, type) and value.__module__ == name:
            yield f"{name}.{key}.__dict__", frozenset(_attributes(value))
            for attribute in _attributes(value):
                yield f"{name}.{key}.{attribute}", _identity(vars(value)[attribute])


def _identity(value: object) -> object:
    """The function itself: torch wraps `step` of an optimizer's class, and marks it so, when the first one is made."""
    wrapped = isinstance(value, FunctionType) and getattr(value, "hooked", False)
    return getattr(value, "__wrapped__", value) if wrapped else value


def _attributes(cls: type) -> list[str]:
    """The methods, properties and inner classes of a class; values are left out: libraries keep caches there."""
    own = list(vars(cls).items())
    return [
        name for name, value in own if not name.startswith(UNSTABLE) and (callable(value) or isinstance(value, CODE))
    ]


def changes(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Names that were there before and are something else now, or are gone; and methods that classes gained."""
    changed = []
    for name, value in before.items():
        now = after.get(name)
        if name.endswith(".__dict__") and isinstance(value, frozenset) and isinstance(now, frozenset):
            cls = name.removesuffix(".__dict__")
            changed += [f"{cls}.{new}" for new in sorted(now - value)]
        elif now is not value:
            changed.append(name)
    return changed


@contextmanager
def foreign_classes_stay_as_they_are(who: str) -> Iterator[None]:
    """Raise `RuleBroken` if the block replaces functions or methods of torch, transformers and the like.

    Args:
        who: whose code runs in the block, for the message.
    """
    load_watched()
    before = fingerprint()
    yield
    changed = changes(before, fingerprint())
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    require(
        not changed,
        f"{who} changed {', '.join(changed[:3])}{more}",
        "A class or function of another package serves every model of the process; changing it cannot be undone.",
        "Return ModulePatch records from patch_modules or patch_attention; the kernel applies them to one model.",
    )
