"""Applying patch records: matched, checked for collisions, proven to act, and undone to byte-identical modules.

A plugin never patches; it returns `ModulePatch` records and this file applies them to the instances of one model. Three
kinds
of replacement: another module in the old one's place, another `forward` on the instance, or a value at a seam that a
library offers. A forward pre-hook counts the calls of every patched module, because a patch that is never called is a
silent no-op. The idea of declared, fqn-targeted replacements with per-node conflicts follows torchtitan's overrides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
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
    module: Module
    kind: str
    undo: Callable[[], None]
    calls: Callable[[], int]
    stop_counting: Callable[[], None] = lambda: None


@dataclass
class PatchLog:
    """Every patch applied in a run, in order."""

    applied: list[Applied] = field(default_factory=list)

    def apply(self, model: Model, answers: Sequence[tuple[str, Sequence[ModulePatch]]]) -> None:
        """Apply the records of all plugins to one model, in list order.

        Raises:
            PatchError: a target matches nothing, a required trait is missing, or two patches collide.
        """
        for plugin, patch in ((plugin, patch) for plugin, patches in answers for patch in patches):
            modules = dict(model.module.named_modules())
            for name in _targets(model, modules, plugin, patch):
                self._replace(model.module, plugin, patch, name, modules[name])

    def _replace(self, root: Module, plugin: str, patch: ModulePatch, name: str, old: Any) -> None:
        new: Any = patch.replace(old)
        if new is old or (not name and hasattr(new, "named_modules")):
            raise fail("patch-result", slot=patch.slot, plugin=plugin, module=name or "the whole model")
        path, _, leaf = name.rpartition(".")
        if isinstance(new, SeamChange):
            kind, holder, attribute, value = "seam", new.holder, new.attribute, new.value
        elif hasattr(new, "named_modules"):
            kind, holder, attribute, value = "module", root.get_submodule(path), leaf, new
        else:
            kind, holder, attribute, value = "forward", old, "forward", new
        self._refuse_collision(plugin, patch, name, kind, old)
        module = new if kind == "module" else old
        applied = Applied(plugin, patch, name, module, kind, _set(holder, attribute, value), lambda: 0)
        if isinstance(new, SeamChange):
            before = new.calls()
            applied.calls = lambda: new.calls() - before
        else:
            _count_calls(applied, module)
        self.applied.append(applied)

    def _refuse_collision(self, plugin: str, patch: ModulePatch, name: str, kind: str, old: Module) -> None:
        """Refuse a second patch on a module and slot, inside a replaced module, or around a patched one.

        A patch of another plugin named in `after` is built upon, and no collision. Modules are told apart by identity:
        adapters rename them, and a second model has the same names.
        """
        for other in self.applied:
            if other.plugin != plugin and other.plugin in patch.after:
                continue
            if other.module is old:
                where = "on" if other.patch.slot == patch.slot else ""
            elif other.kind == "module" and other.plugin != plugin and old in other.module.modules():
                where = "around"
            else:
                where = "inside" if kind == "module" and other.module in old.modules() else ""
            if where:
                raise fail("patch-collision", patch=patch, module=name, where=where, first=other, second=plugin)

    def verify(self) -> None:
        """Raise unless every patched module counted a call since it was patched; counting stops.

        Raises:
            PatchError: naming each patch that was not called.
        """
        idle = [f"{a.patch.slot} of {a.module_name}, by '{a.plugin}'" for a in self.applied if a.calls() == 0]
        for applied in self.applied:
            applied.stop_counting()
        if idle:
            lines = "".join(f"\n- {line}" for line in idle[:5])
            raise fail("patch-never-called", count=len(idle), all=len(self.applied), lines=lines)

    def undo(self) -> None:
        """Take every patch back, last first: the modules are the ones that were loaded."""
        while self.applied:
            applied = self.applied.pop()
            applied.stop_counting()
            applied.undo()

    def summary(self) -> list[dict[str, Any]]:
        """One entry per plugin, slot and reason, with the modules it changed; for the plan."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for a in self.applied:
            key = (a.plugin, a.patch.slot, a.kind, a.patch.reason, a.patch.source)
            groups.setdefault(key, []).append(a.module_name)
        names = ("plugin", "slot", "kind", "reason", "source")
        return [{**dict(zip(names, key, strict=True)), "modules": modules} for key, modules in groups.items()]


def _targets(model: Model, modules: Mapping[str, Module], plugin: str, patch: ModulePatch) -> list[str]:
    """The names of the modules that a patch is for; there must be some, and the model must have the required traits."""
    missing = ", ".join(sorted(patch.requires - model.traits))
    if missing:
        traits = ", ".join(sorted(model.traits)) or "no traits"
        raise fail("patch-trait", patch=patch, plugin=plugin, model=model, missing=missing, traits=traits)
    target = patch.target
    matches = _pattern(target) if isinstance(target, str) else target
    names = [name for name, module in modules.items() if matches(name, module)]
    if not names:
        leaves = {name.rsplit(".", 1)[-1] for name in modules if name}
        near = nearest(str(target).rsplit(".", 1)[-1], leaves) or sorted(leaves)[:5]
        raise fail("patch-idle-target", patch=patch, plugin=plugin, model=model, near=", ".join(near))
    return names


def _pattern(glob: str) -> Callable[[str, Module], bool]:
    """A dotted glob: `*` is one part of a name (or some of it), `**` any number; a match may start at any part."""
    parts = [".*" if part == "**" else re.escape(part).replace(r"\*", "[^.]*") for part in glob.split(".")]
    pattern = re.compile(r"(?:.*\.)?" + r"\.".join(parts))
    return lambda name, _: pattern.fullmatch(name) is not None


def _set(holder: Any, attribute: str, value: object) -> Callable[[], None]:
    """Set an attribute of an instance; what is returned sets it back, or takes it away if only the class had one."""
    own, before = attribute in vars(holder), getattr(holder, attribute)
    setattr(holder, attribute, value)
    inherited = not own and attribute in vars(holder)
    return lambda: delattr(holder, attribute) if inherited else setattr(holder, attribute, before)


def _count_calls(applied: Applied, module: Any) -> None:
    count = [0]

    def counting(*_: object) -> None:
        count[0] += 1

    handle = module.register_forward_pre_hook(counting)
    applied.calls = lambda: count[0]
    applied.stop_counting = handle.remove
