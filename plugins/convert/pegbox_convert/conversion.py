"""One conversion: what was read, what was written, and what became of each key.

Functions for keys that belong together (`steps`) take values by name, and put them into our config with the names they
came from. A key counts as dealt with when something was put, or said, about it; the rest is looked up in the table,
and what nobody knows is reported as unknown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from pegbox.errors import nearest

from pegbox_convert import ours
from pegbox_convert.foreign import Foreign
from pegbox_convert.table import Rule, Table, matches
from pegbox_convert.values import READERS, quiet


class Status(StrEnum):
    """What became of a key."""

    MAPPED = "mapped"
    DIFFERS = "mapped, with a difference"
    DEFAULT = "default differs: written"
    UNNEEDED = "nothing to set"
    LATER = "not supported yet"
    UNKNOWN = "unknown key"


SEVERITY = (Status.UNNEEDED, Status.DEFAULT, Status.MAPPED, Status.DIFFERS, Status.LATER, Status.UNKNOWN)


@dataclass(frozen=True)
class Entry:
    """One line of the report.

    Attributes:
        key: the key as it stands in the file; for defaults, the key that is not there.
        ours: where it went in our config.
        line: `file:line`, where there is one.
    """

    key: str
    value: Any
    status: Status
    ours: tuple[str, ...] = ()
    note: str = ""
    line: str = ""


@dataclass
class Conversion:
    """A conversion while it goes on.

    Attributes:
        folder: where relative paths of the new config will start.
        draft: our config, nested.
        sources: the keys that a place in our config came from, by its path.
        entries: the report, by key.
        plugins: active plugins.
        method: what the config trains by; `other` if there is no such method here.
        fixed: places that the method has written for good, with the reason.
        columns: columns of rows beside the prompt, where a file tells them.
    """

    foreign: Foreign
    table: Table
    folder: Path
    draft: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    plugins: set[str] = field(default_factory=lambda: set(ours.ALWAYS))
    method: str = "sft"
    fixed: dict[str, tuple[Any, str]] = field(default_factory=dict)
    columns: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether the file sets a key (by the functions' name for it)."""
        key = self.table.key(name)
        return self.foreign.has(key) and self.table.is_known(key)

    def get(self, name: str, read: str = "plain") -> Any:
        """The value of a key, or the program's default. A value that cannot be read is reported; the default serves."""
        key = self.table.key(name)
        default = self.table.defaults.get(key)
        value = self.foreign.get(key, default) if self.table.is_known(key) else default
        if value is None:
            return default
        try:
            return READERS[read](value)
        except ValueError as error:
            self.later(name, str(error))
            return default

    def written(self, path: str) -> Any:
        """What our config holds at a path so far, else our default."""
        found: Any = self.draft
        for part in path.split("."):
            found = found.get(part, ours.ABSENT) if isinstance(found, dict) else ours.ABSENT
        return ours.default(path) if found is ours.ABSENT else found

    def start(self, plugin: str) -> None:
        """Make a plugin active."""
        self.plugins.add(plugin)

    def put(
        self, path: str, value: Any, *names: str, note: str = "", differs: bool = False, always: bool = False
    ) -> None:
        """Write a value that comes from these keys. Without them it is a default, written where ours differs.

        Args:
            differs: a difference remains, which `note` names.
            always: write a default even where it is ours as well.
        """
        present = [name for name in names if self.has(name)]
        first = path.split(".")[0]
        if first not in ours.CORE:
            self.start(first)
        if present:
            for name in present:
                self._note(name, Status.DIFFERS if differs else Status.MAPPED, note, path)
            self._write(path, value, ", ".join(self._as_written(self.table.key(name)) for name in present))
        elif always or not ours.same(ours.default(path), value):
            self._write(path, value, f"{self.table.title}'s default")
            if names:
                key = self.table.key(names[0])
                known = self.entries.get(key)
                paths = (*known.ours, path) if known else (path,)
                theirs = self.table.defaults.get(key, value)
                self.entries[key] = Entry(key, theirs, Status.DEFAULT, paths, note)

    def fix(self, path: str, value: Any, why: str) -> None:
        """Write a value that no key changes any more, if its plugin becomes active."""
        self.fixed[path] = (value, why)

    def later(self, name: str, why: str, *, key: str = "") -> None:
        """Report a key as not supported yet, with the reason."""
        self._note(name, Status.LATER, why, key=key)

    def note_plugin(self, name: str, plugin: str, note: str = "") -> None:
        """Report a key as mapped to a plugin that has no settings for it."""
        self._note(name, Status.MAPPED, note, f"plugins: {plugin}")

    def mapped(self, key: str, path: str, note: str = "") -> None:
        """Report a key whose value was put as a part of something larger."""
        self._note(key, Status.MAPPED, note, path)

    def by_default(self, key: str, value: Any, path: str, note: str) -> None:
        """Report a default that was written as a part of something larger."""
        self.entries[key] = Entry(key, value, Status.DEFAULT, (path,), note)

    def unneeded(self, name: str, why: str) -> None:
        """Report a key that needs nothing."""
        self._note(name, Status.UNNEEDED, why)

    def differs(self, name: str, why: str) -> None:
        """Report a difference that remains."""
        self._note(name, Status.DIFFERS, why)

    def default_differs(self, name: str, why: str) -> None:
        """Report a default that we cannot write; nothing if the key is set."""
        key = self.table.key(name)
        if not self.has(name):
            self.entries[key] = Entry(key, None, Status.LATER, (), why)

    def finish(self, steps: dict[str, Callable[[Conversion], None]]) -> None:
        """Run the steps, then the rules, then report what is left."""
        for step in self.table.steps:
            self._step(step, steps[step])
        for key, rule in self.table.rules.items():
            self._apply(key, rule)
        for leaf in self.foreign.leaves():
            if self._as_written(leaf) not in self.entries:
                self._leftover(leaf)

    def _step(self, step: str, function: Callable[[Conversion], None]) -> None:
        """Run a function; a value that it cannot read is reported with the keys that it has not dealt with."""
        try:
            function(self)
        except (ValueError, TypeError) as error:
            for leaf in self.foreign.leaves():
                if self.table.step_of(leaf) == step and self._as_written(leaf) not in self.entries:
                    self._note(leaf, Status.LATER, f"a value beside it cannot be read: {error}")

    def _apply(self, key: str, rule: Rule) -> None:
        value = self.foreign.get(key)
        optional = rule.to.split(".")[0]
        active = optional in ours.CORE or optional in self.plugins
        if active and rule.to in self.fixed:
            self._write_fixed(key, rule.to)
            return
        if not self.foreign.has(key) or value is None:
            if active and key in self.table.defaults:
                self.put(rule.to, READERS[rule.read](self.table.defaults[key]), key, note=rule.note)
            elif value is None and self.foreign.has(key):
                self.unneeded(key, "empty")
            return
        if not active and (quiet(value) or not rule.starts):
            self.unneeded(key, "switched off" if quiet(value) else f"has no effect here: {optional} is not in use")
            return
        try:
            read = READERS[rule.read](value)
        except ValueError as error:
            self.later(key, str(error))
            return
        self.put(rule.to, read, key, note=rule.note, differs=rule.differs)

    def _write_fixed(self, key: str, path: str) -> None:
        value, why = self.fixed[path]
        if not ours.same(ours.default(path), value):
            self._write(path, value, f"{self.table.title}'s default")
        if self.foreign.has(key):
            self.unneeded(key, why)

    def _leftover(self, leaf: str) -> None:
        value = self.foreign.get(leaf)
        later, unneeded = matches(leaf, self.table.later), matches(leaf, self.table.unneeded)
        if later is not None and "*" in later and any(leaf in keys for keys in self.table.steps.values()):
            later = None
        if later is not None and (unneeded is None or len(later) >= len(unneeded)):
            default = self.table.defaults.get(leaf)
            if quiet(value) or (default is not None and value == default):
                self._note("", Status.UNNEEDED, f"switched off ({self.table.later[later]})", key=leaf)
            else:
                self._note("", Status.LATER, self.table.later[later], key=leaf)
        elif unneeded is not None:
            self._note("", Status.UNNEEDED, self.table.unneeded[unneeded], key=leaf)
        elif self.table.step_of(leaf):
            self._note(
                "", Status.UNNEEDED, "switched off" if quiet(value) else "has no effect beside the other keys", key=leaf
            )
        else:
            close = nearest(leaf, self.table.known())
            hint = f"Did you mean {' or '.join(close)}?" if close else f"{self.table.title} has no such key"
            self._note("", Status.UNKNOWN, hint, key=leaf)

    def _note(self, name: str, status: Status, note: str, path: str = "", key: str = "") -> None:
        found = key or self.table.key(name)
        for leaf in self.foreign.leaves(found) or [found]:
            written = self._as_written(leaf)
            older = self.foreign.notes.get(leaf, "")
            entry = Entry(written, self.foreign.get(leaf), status, (), older, self.foreign.lines.get(leaf, ""))
            known = self.entries.get(written, entry)
            worst = max(known.status, status, key=SEVERITY.index)
            notes = [part for part in dict.fromkeys([*known.note.split("; "), *note.split("; ")]) if part]
            paths = dict.fromkeys([*known.ours, path] if path else known.ours)
            self.entries[written] = replace(known, status=worst, note="; ".join(notes), ours=tuple(paths))

    def _as_written(self, leaf: str) -> str:
        return self.foreign.written.get(leaf, leaf)

    def _write(self, path: str, value: Any, source: str) -> None:
        *parents, last = path.split(".")
        holder = self.draft
        for part in parents:
            holder = holder.setdefault(part, {})
        holder[last] = value
        self.sources[path] = source

    def config(self) -> dict[str, Any]:
        """Our config, its keys in the order in which a person would write them."""
        plugins = ours.ordered(self.plugins, self.draft)
        model = self.draft.get("model", {})
        named = {"name": model["name"]} if "name" in model else {}
        head: dict[str, Any] = {"model": {**named, **model}, "plugins": plugins}
        rest: dict[str, Any] = {
            key: self.draft[key] for key in ("output", "seed", "resume", "use", "loss", "rewards") if key in self.draft
        }
        return {**head, **rest, **{name: self.draft[name] for name in plugins if self.draft.get(name)}}
