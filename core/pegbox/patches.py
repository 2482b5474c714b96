"""Applying patch records: matched, checked for collisions, proven to act, and undone to byte-identical modules.

A plugin never patches; it returns `ModulePatch` records and this file applies them to the instances of one model. Three kinds
of replacement: another module in the old one's place, another `forward` on the instance, or a value at a seam that a
library offers. A forward pre-hook counts the calls of every patched module, because a patch that is never called is a silent
no-op. The idea of declared, fqn-targeted replacements with per-node conflicts follows torchtitan's overrides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pegbox.errors import fail, nearest
from pegbox.types import Model, ModulePatch, SeamChange

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass
class Applied:
    """One patch on one module: who, where, how to undo it, and how often it was called."""

    plugin: str
    patch: ModulePatch
    module_name: str
    kind: str
    undo: Callable[[], None]
    calls: Callable[[], int]
    stop_counting: Callable[[], None] = lambda: None

    def describe(self) -> str:
        return f"{self.patch.slot} of {self.module_name} ({self.kind}), by plugin '{self.plugin}'"


@dataclass
class PatchLog:
    """Every patch applied in a run, in order."""

    applied: list[Applied] = field(default_factory=list)
    _roots: dict[int, list[Applied]] = field(default_factory=dict)

    def apply(self, model: Model, answers: Sequence[tuple[str, Sequence[ModulePatch]]]) -> None:
        """Apply the records of all plugins to one model, in list order.

        Raises:
            PatchError: a target matches nothing, a required trait is missing, or two patches collide.
        """
        for plugin, patches in answers:
            for patch in patches:
                self._apply_one(model, plugin, patch)

    def _apply_one(self, model: Model, plugin: str, patch: ModulePatch) -> None:
        labels = {"slot": patch.slot, "plugin": plugin, "model": model.name}
        missing = ", ".join(sorted(patch.requires - model.traits))
        if missing:
            traits = ", ".join(sorted(model.traits)) or "no traits"
            raise fail("patch-trait", missing=missing, traits=traits, reason=patch.reason, **labels)
        modules = dict(model.module.named_modules())
        targets = [name for name, module in modules.items() if _matches(patch.target, name, module)]
        if not targets:
            target = patch.target if isinstance(patch.target, str) else patch.target.__name__
            leaves = {name.rsplit(".", 1)[-1] for name in modules if name}
            near = nearest(target.rsplit(".", 1)[-1], leaves) or sorted(leaves)[:5]
            raise fail("patch-idle-target", target=target, near=", ".join(near), **labels)
        for name in targets:
            self._check_collision(model, plugin, patch, name)
        for name in targets:
            self._replace(model, plugin, patch, name, modules[name])

    def _check_collision(self, model: Model, plugin: str, patch: ModulePatch, name: str) -> None:
        for other in self._roots.get(id(model.module), []):
            above = other.kind == "module" and other.plugin != plugin and name.startswith(f"{other.module_name}.")
            if above or (other.module_name == name and other.patch.slot == patch.slot):
                why = (
                    f"'{other.plugin}' already replaced {other.module_name}."
                    if above
                    else "One module and slot takes one patch."
                )
                self._collide(other, plugin, patch, name, why)

    def _collide(self, other: Applied, plugin: str, patch: ModulePatch, name: str, why: str) -> None:
        """Two patches meet: an error, unless the second one says that it builds upon the first."""
        if other.plugin == plugin or other.plugin not in patch.after:
            first = {"first": other.plugin, "first_reason": other.patch.reason}
            second = {"second": plugin, "second_reason": patch.reason}
            raise fail("patch-collision", slot=patch.slot, module=name, why=why, **first, **second)

    def _replace(self, model: Model, plugin: str, patch: ModulePatch, name: str, old: Module) -> None:
        new: Any = patch.replace(old)
        labels = {"slot": patch.slot, "plugin": plugin}
        if new is old:
            raise fail("patch-same", module=name, **labels)
        if isinstance(new, SeamChange):
            kind, calls, holder, attribute, value = "seam", new.calls, new.holder, new.attribute, new.value
        elif hasattr(new, "named_modules"):
            if not name:
                raise fail("patch-root", **labels)
            for other in self._roots.get(id(model.module), []):
                if other.module_name.startswith(f"{name}."):
                    self._collide(
                        other,
                        plugin,
                        patch,
                        name,
                        f"{other.module_name}, patched before, lies inside and would be lost.",
                    )
            parent, _, attribute = name.rpartition(".")
            kind, calls, holder, value = "module", None, model.module.get_submodule(parent), new
        else:
            kind, calls, holder, attribute, value = "forward", None, old, "forward", new
        applied = Applied(plugin, patch, name, kind, _set(holder, attribute, value), lambda: 0)
        if calls is not None:
            before = calls()
            applied.calls = lambda: calls() - before
        else:
            _count_calls(applied, new if kind == "module" else old)
        self.applied.append(applied)
        self._roots.setdefault(id(model.module), []).append(applied)

    def adopt(self, old: Model, new: Model) -> None:
        """The patches of `old` now belong to `new`: an adapter wrapped its module."""
        if old.module is not new.module:
            self._roots.setdefault(id(new.module), []).extend(self._roots.pop(id(old.module), []))

    def verify(self) -> None:
        """Raise unless every patched module counted a call since it was patched; counting stops.

        Raises:
            PatchError: naming each patch that was not called.
        """
        idle = [applied.describe() for applied in self.applied if applied.calls() == 0]
        for applied in self.applied:
            applied.stop_counting()
        if idle:
            more = [f"and {len(idle) - 5} more"] if len(idle) > 5 else []
            lines = "".join(f"\n- {line}" for line in [*idle[:5], *more])
            raise fail("patch-never-called", count=len(idle), all=len(self.applied), lines=lines)

    def undo(self) -> None:
        """Take every patch back, last first: the modules are the ones that were loaded."""
        while self.applied:
            applied = self.applied.pop()
            applied.stop_counting()
            applied.undo()
        self._roots.clear()

    def summary(self) -> list[dict[str, object]]:
        """One entry per plugin, slot and reason, with the modules it changed; for the plan."""
        groups: dict[tuple[str, str, str, str, str], list[str]] = {}
        for a in self.applied:
            groups.setdefault((a.plugin, a.patch.slot, a.kind, a.patch.reason, a.patch.source), []).append(
                a.module_name
            )
        keys = ("plugin", "slot", "kind", "reason", "source")
        return [{**dict(zip(keys, group, strict=True)), "modules": names} for group, names in groups.items()]


def _matches(target: str | Callable[[str, Module], bool], name: str, module: Module) -> bool:
    if not isinstance(target, str):
        return target(name, module)
    return _pattern(target).fullmatch(name) is not None


def _pattern(glob: str) -> re.Pattern[str]:
    """A dotted glob: `*` stands for one part of a name (or some of it), `**` for any number; a match may start at any part."""
    parts = [".*" if part == "**" else re.escape(part).replace(r"\*", "[^.]*") for part in glob.split(".")]
    return re.compile(r"(?:.*\.)?" + r"\.".join(parts))


def _set(holder: Any, attribute: str, value: object) -> Callable[[], None]:
    """Set an attribute of an instance; what is returned sets it back, or takes it away if the instance had none."""
    own = vars(holder) if attribute == "forward" else None
    before = getattr(holder, attribute) if own is None else own.get(attribute)
    setattr(holder, attribute, value)

    def undo() -> None:
        if before is None and own is not None:
            delattr(holder, attribute)
        else:
            setattr(holder, attribute, before)

    return undo


def _count_calls(applied: Applied, module: Any) -> None:
    count = [0]

    def counting(*_: object) -> None:
        count[0] += 1

    handle = module.register_forward_pre_hook(counting)
    applied.calls = lambda: count[0]
    applied.stop_counting = handle.remove
