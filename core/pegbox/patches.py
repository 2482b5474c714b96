"""Applying patch records: matched, checked for collisions, proven to act, and undone to byte-identical modules.

A plugin never patches; it returns `ModulePatch` records and this file applies them to the instances of one model. Three
kinds of replacement: another module in the old one's place (in each of its places, where a model ties it), another
`forward` on the instance, or a value at a seam that a library offers. What replaces must hold on to what it found, or
the patch before it is lost; a forward pre-hook counts the calls of every patched module, because a patch that is never
called is a silent no-op. The idea of declared, fqn-targeted replacements with per-node conflicts follows torchtitan's
overrides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from sys import getrefcount
from typing import TYPE_CHECKING, Any

from pegbox.errors import fail, nearest
from pegbox.types import Model, ModulePatch, SeamChange

if TYPE_CHECKING:
    from torch.nn import Module


@dataclass
class Applied:
    """One patch on one module: who, where, how to undo it, and how often it was called.

    Attributes:
        kind: `module`, `forward`, `seam`, or `calls`: the forward is as it was, and its calls are counted.
        place: the attribute that was set, as its holder's identity and its name.
    """

    plugin: str
    patch: ModulePatch
    module_name: str
    module: Module
    kind: str
    place: tuple[int, str]
    undo: ExitStack = field(default_factory=ExitStack)
    calls: Callable[[], int] = lambda: 0
    stop_counting: Callable[[], None] = lambda: None


@dataclass
class PatchLog:
    """Every patch applied in a run, in order."""

    applied: list[Applied] = field(default_factory=list)

    def apply(self, model: Model, answers: Sequence[tuple[str, Sequence[ModulePatch]]]) -> None:
        """Apply the records of all plugins to one model, in list order; one record from the inside out.

        Raises:
            PatchError: a target matches nothing, a required trait is missing, or two patches collide.
        """
        for plugin, patch in ((plugin, patch) for plugin, patches in answers for patch in patches):
            names: dict[Module, list[str]] = {}
            for name, module in model.module.named_modules(remove_duplicate=False):
                names.setdefault(module, []).append(name)
            for module in _targets(model, names, plugin, patch):
                self._replace(model.module, plugin, patch, names[module], module)

    def _replace(self, root: Module, plugin: str, patch: ModulePatch, names: list[str], old: Any) -> None:
        new, kept = self._replacement(patch, old)
        if new is old or (not names[0] and hasattr(new, "named_modules")):
            raise fail("patch-result", slot=patch.slot, plugin=plugin, module=names[0] or "the whole model")
        kind, module, value, places = "calls" if new == old.forward else "forward", old, new, [(old, "forward")]
        if isinstance(new, SeamChange):
            kind, value, places = "seam", new.value, [(new.holder, new.attribute)]
        elif hasattr(new, "named_modules"):
            parts = [name.rpartition(".") for name in names]
            kind, module, places = "module", new, [(root.get_submodule(path), leaf) for path, _, leaf in parts]
        applied = Applied(plugin, patch, names[0], module, kind, (id(places[0][0]), places[0][1]))
        self._refuse_collision(applied, old, kept)
        for holder, attribute in places:
            applied.undo.callback(_set(holder, attribute, value))
        if isinstance(new, SeamChange):
            before = new.calls()
            applied.calls = lambda: new.calls() - before
        else:
            _count_calls(applied, module)
        self.applied.append(applied)

    def _replacement(self, patch: ModulePatch, old: Any) -> tuple[Any, bool]:
        """What takes the place of a module, and whether it holds on to the forward it found there.

        While `replace` runs, the forward of a patched module is one object: who keeps it has one more reference to it.
        """
        with ExitStack() as lent:
            found = old.forward
            if any(other.module is old for other in self.applied):
                lent.callback(_set(old, "forward", found))
            held = getrefcount(found)
            return patch.replace(old), getrefcount(found) > held

    def _refuse_collision(self, new: Applied, old: Module, kept: bool) -> None:
        """Refuse to lose an earlier patch, a second one on a module and slot or a seam, and one in a replaced module.

        To build upon a patch of another plugin named in `after` is no collision, to lose it is. Modules are told apart
        by identity: adapters rename them, and a second model has the same names.
        """
        gone = set(old.modules()) - set(new.module.modules()) if new.kind == "module" else set()
        for other in self.applied:
            same, foreign = other.module is old, other.plugin != new.plugin
            dropped = same and not kept and new.kind == "forward" and other.kind in ("module", "forward")
            lost = dropped or other.module in gone
            seam = foreign and new.kind == "seam" and new.place == other.place
            around = foreign and not same and other.kind == "module" and old in other.module.modules()
            twice = same and other.patch.slot == new.patch.slot
            if lost or ((seam or around or twice) and not (foreign and other.plugin in new.patch.after)):
                nested = other.patch is new.patch and not same
                raise fail("patch-nested" if nested else "patch-collision", first=other, second=new)

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

    def undo(self, model: Model | None = None) -> None:
        """Take patches back, last first, and forget them: all, or those of one model. Its modules are as loaded."""
        own = {applied.module for applied in self.applied} if model is None else set(model.module.modules())
        for applied in reversed(self.applied):
            if applied.module in own:
                applied.undo.close()
        self.applied = [applied for applied in self.applied if applied.module not in own]

    def summary(self) -> list[dict[str, Any]]:
        """One entry per plugin, slot and reason, with the modules it changed; for the plan."""
        groups: dict[tuple[str, ...], list[str]] = {}
        for a in self.applied:
            key = (a.plugin, a.patch.slot, a.kind, a.patch.reason, a.patch.source)
            groups.setdefault(key, []).append(a.module_name)
        names = ("plugin", "slot", "kind", "reason", "source")
        return [{**dict(zip(names, key, strict=True)), "modules": modules} for key, modules in groups.items()]


def _targets(model: Model, names: Mapping[Module, Sequence[str]], plugin: str, patch: ModulePatch) -> list[Module]:
    """The modules that a patch is for, innermost first; there must be some, and the model must have its traits."""
    if missing := ", ".join(sorted(patch.requires - model.traits)):
        traits = ", ".join(sorted(model.traits)) or "no traits"
        raise fail("patch-trait", patch=patch, plugin=plugin, model=model, missing=missing, traits=traits)
    target = patch.target
    matches = _pattern(target) if isinstance(target, str) else target
    found = [module for module, known in names.items() if any(matches(name, module) for name in known)]
    if not found:
        leaves = {name.rsplit(".", 1)[-1] for known in names.values() for name in known if name}
        near = nearest(str(target).rsplit(".", 1)[-1], leaves) or sorted(leaves)[:5]
        raise fail("patch-idle-target", patch=patch, plugin=plugin, model=model, near=", ".join(near))
    return sorted(found, key=lambda module: -max(name.count(".") for name in names[module]))


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
    applied.calls, applied.stop_counting = lambda: count[0], handle.remove
    applied.undo.callback(handle.remove)
