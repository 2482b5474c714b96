"""A config of another program: its keys with their values and lines, and which program it is of."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pegbox.errors import ConfigError, did_you_mean
from pegbox.source import parse

from pegbox_convert.table import TABLES, Table

MISSING = object()
COMMANDS = ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo")
"""TRL's trainers that have a command or an example script."""
COMMAND = re.compile(rf"\btrl (?P<command>{'|'.join(COMMANDS)})\s|\bscripts/(?P<script>{'|'.join(COMMANDS)})\.py\s")


@dataclass
class Foreign:
    """What the file says.

    Attributes:
        tree: its content.
        lines: `file:line` by key path, where the file has lines.
        notes: remarks on keys that were spelled in an older way, by the key as written.
        written: the key as it stands in the file, by the key that it is read as.
        command: what a command line does, such as `dpo` of `trl dpo`; empty for a file of keys.
    """

    tree: dict[str, Any]
    lines: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    command: str = ""

    def get(self, key: str, default: Any = None) -> Any:
        """The value at a dotted key, or `default`."""
        found: Any = self.tree
        for part in key.split("."):
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                return default
        return found

    def has(self, key: str) -> bool:
        return self.get(key, MISSING) is not MISSING

    def leaves(self, key: str = "") -> list[str]:
        """Every innermost key below a key; a list of plain values counts as one."""
        value = self.get(key, MISSING) if key else self.tree
        return [] if value is MISSING else list(_leaves(key, value))


def _leaves(key: str, value: Any) -> Iterator[str]:
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inner = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        inner = list(enumerate(value))
    if not inner:
        yield key
    for name, item in inner:
        yield from _leaves(f"{key}.{name}" if key else str(name), item)


def read(path: Path, program: str = "auto") -> tuple[Foreign, Table]:
    """Read a config.

    Args:
        path: YAML, JSON, or a text file with one command line `trl dpo --key value ...`.
        program: name of a table, or `auto`: the one whose typical keys the file has; behind a colon the command that
            a file of keys is for, as in `trl:dpo`.

    Raises:
        ConfigError: there is no such file, it cannot be read, or nobody can tell which program it is of.
    """
    program, _, command = program.partition(":")
    if command and (program != "trl" or command not in COMMANDS):
        raise ConfigError(
            f"--from is '{program}:{command}', and there is no such command",
            f"Commands of trl: {', '.join(COMMANDS)}; the other programs' configs name their method.",
            "Correct --from.",
        )
    if program != "auto" and program not in TABLES:
        raise ConfigError(
            f"--from is '{program}', which is no program", did_you_mean(program, TABLES, "Known:"), "Correct --from."
        )
    if not path.is_file():
        near = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise ConfigError(f"{path} does not exist", did_you_mean(path.name, near, "Configs there:"), "Correct FILE.")
    try:
        text = path.read_text(encoding="utf-8")
        foreign = _command_line(text) or _yaml(text, path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "It must be a text file.", "Correct FILE.") from error
    table = Table.load(program) if program != "auto" else _recognized(foreign, path)
    rename(foreign, table)
    foreign.command = command or foreign.command
    return foreign, table


def _yaml(text: str, path: Path) -> Foreign:
    layer = parse(text, path.name)
    lines = {".".join(map(str, key)): origin for key, origin in layer.origins.items()}
    return Foreign(layer.data, lines)


def _command_line(text: str) -> Foreign | None:
    """The flags of `trl dpo --a 1 --b`, if the file is such a line (comments and line continuations allowed)."""
    plain = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#")).strip()
    found = COMMAND.search(plain)
    if found is None or "--" not in plain[found.end() :] or plain.startswith("{"):
        return None
    words = shlex.split(plain[found.end() :].replace("\\\n", " "))
    tree: dict[str, Any] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            key = name.replace("-", "_")
            tree[key] = [value] if equals else []
        elif tree:
            tree[key].append(word)
    flags = {key: _words(values) for key, values in tree.items()}
    named = flags.pop("config", None)
    below = _yaml(Path(str(named)).read_text(encoding="utf-8"), Path(str(named))) if named else Foreign({})
    lines = {key: line for key, line in below.lines.items() if key not in flags}
    return Foreign({**below.tree, **flags}, lines, command=found["command"] or found["script"])


def _words(values: list[str]) -> Any:
    read = [parse(f"x: {value}", "command line").data["x"] for value in values]
    return True if not read else read[0] if len(read) == 1 else read


def _recognized(foreign: Foreign, path: Path) -> Table:
    tables = [Table.load(name) for name in TABLES]
    found = [(sum(foreign.has(mark) for mark in table.marks), table) for table in tables]
    best = max(count for count, _ in found)
    chosen = [table for count, table in found if count == best]
    if best == 0 or len(chosen) > 1:
        marks = "; ".join(f"{table.title}: {', '.join(table.marks)}" for table in tables)
        raise ConfigError(
            f"{path.name}: it is not clear which program this config is of",
            f"Its keys are compared with typical ones ({marks}).",
            f"Name the program: --from {'|'.join(TABLES)}",
        )
    return chosen[0]


def rename(foreign: Foreign, table: Table) -> None:
    """Read keys of older versions as what they are called today."""
    for old, new in table.renamed.items():
        parent, _, name = old.rpartition(".")
        holder = foreign.get(parent) if parent else foreign.tree
        if not isinstance(holder, dict) or name not in holder or foreign.has(new):
            continue
        value = holder.pop(name)
        target: dict[str, Any] = foreign.tree
        *parents, last = new.split(".")
        for part in parents:
            target = target.setdefault(part, {})
        target[last] = value
        for leaf in _leaves(new, value):
            older = old + leaf[len(new) :]
            foreign.written[leaf] = older
            foreign.notes[leaf] = f"{old} is an older name of {new}"
            if older in foreign.lines:
                foreign.lines[leaf] = foreign.lines[older]
