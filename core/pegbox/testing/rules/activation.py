"""What activating a plugin loads, shares and changes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pegbox.plan import compose
from pegbox.testing.fingerprint import foreign_classes_stay_as_they_are
from pegbox.testing.probe import declarations, in_another_process
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject

MUTABLE = (list, dict, set, bytearray)


def _report(subject: Subject) -> dict[str, Any]:
    report = in_another_process(subject.installed.value, subject.mapping(), subject.plugin)
    if "error" in report:
        raise RuleBroken(
            f"'{subject.plugin}' cannot be activated in a process of its own:\n{report['error']}",
            "Every process of a run activates its plugins itself.",
            "Look at the last lines above; set `config` and `with_plugins` in the conformance class if they miss.",
        )
    return report


def is_imported_in_no_time(subject: Subject) -> None:
    """Importing the plugin and making its instance loads the standard library, the core and its own package alone."""
    others = [name for name in _report(subject)["loaded"] if name != subject.package]
    require(
        not others,
        f"importing {subject.package} and making its instance imports {', '.join(others)}",
        "`pegbox plan` imports the listed plugins: it answers at once, and without a GPU library.",
        "Move the import into the hook that needs it, and under `if TYPE_CHECKING` for annotations.",
    )


def declares_without_heavy_imports(subject: Subject) -> None:
    """A config with the plugin is composed without torch and the like."""
    heavy = _report(subject)["heavy"]
    require(
        not heavy,
        f"composing a config with '{subject.plugin}' imports {', '.join(heavy)}",
        "A plan is made, and a config checked, in an instant and without a GPU library.",
        "Let register_config and register_items declare plain data; name targets as 'package.module:attribute'.",
    )


def declares_the_same_in_every_process(subject: Subject) -> None:
    """Section, items and hooks are the same in a process of its own: no rank composes another plan."""
    there = _report(subject)["declared"]
    here = declarations(compose(subject.mapping()).kernel, subject.plugin)
    different = [key for key in here if here[key] != there[key]]
    key = different[0] if different else ""
    require(
        not different,
        f"'{subject.plugin}' declares other {key} in another process: {here.get(key)} here, {there.get(key)} there",
        "Every process of a run composes its own plan, and the run stops unless they agree.",
        "Declare constants: nothing that depends on the process, the time, or the order of a set.",
    )


def is_activated_anew_each_time(subject: Subject) -> None:
    """Two activations give two plugins that declare the same and share nothing that can change."""
    kernels = [subject.activate() for _ in range(2)]
    first, second = (kernel.active[subject.plugin].instance for kernel in kernels)
    shared = sorted(name for name, value in _state(first) if any(value is other for _, other in _state(second)))
    require(
        first is not second and not shared,
        f"two instances of '{subject.plugin}' share {', '.join(shared) or 'everything: they are one object'}",
        "Two runs in one process would see each other's state.",
        "Make what a run changes in __init__, on self.",
    )
    told = [declarations(kernel, subject.plugin) for kernel in [*kernels, subject.activate()]]
    require(
        told[0] == told[1] == told[2],
        f"'{subject.plugin}' declares something else the second time",
        "A second run in one process must get the same plugin.",
        "Keep nothing in modules or classes.",
    )


def _state(instance: object) -> Iterator[tuple[str, object]]:
    """What an instance can change: its own containers, and those of its class that are not written as constants."""
    yield from (
        (name, value) for name, value in getattr(instance, "__dict__", {}).items() if isinstance(value, MUTABLE)
    )
    for cls in type(instance).__mro__[:-1]:
        yield from (
            (name, value)
            for name, value in vars(cls).items()
            if isinstance(value, MUTABLE) and not name.isupper() and not name.startswith("__")
        )


def leaves_other_packages_alone(subject: Subject) -> None:
    """Importing, activating and composing replaces no function or method of torch, transformers or the core."""
    with foreign_classes_stay_as_they_are(f"activating '{subject.plugin}'"), _imported_anew(subject.package):
        compose(subject.mapping())


@contextmanager
def _imported_anew(package: str) -> Iterator[None]:
    """Forget a package, so that it is imported again in the block; afterwards everything is as it was."""
    own = {name for name in sys.modules if name == package or name.startswith(f"{package}.")}
    kept = {name: sys.modules.pop(name) for name in own}
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]
        sys.modules.update(kept)
