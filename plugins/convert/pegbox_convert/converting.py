"""From a file to a finished conversion, and whether Pegbox accepts the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pegbox.discovery import discover
from pegbox.errors import PegboxError

from pegbox_convert.conversion import Conversion, Entry, Status
from pegbox_convert.foreign import read
from pegbox_convert.writing import to_yaml


@dataclass(frozen=True)
class Converted:
    """A finished conversion.

    Attributes:
        title: the program that the file is of.
        entries: what became of each key, in the order of the file, defaults behind.
        unsupported: those that are in the file and not in the config, although they mean something.
        text: the config as YAML.
        notes: whether Pegbox accepts it.
        valid: False if it does not.
    """

    title: str
    entries: Sequence[Entry]
    unsupported: Sequence[Entry]
    config: dict[str, Any]
    text: str
    notes: Sequence[str]
    valid: bool


def convert_file(path: Path, program: str = "auto", folder: Path | None = None) -> Converted:
    """Convert a config.

    Args:
        folder: where the new config will lie, which its relative paths start from; the current one unless given.

    Raises:
        ConfigError: the file cannot be read, or nobody can tell which program it is of.
    """
    from pegbox_convert.steps import steps_of

    foreign, table = read(path, program)
    conversion = Conversion(foreign, table, folder or Path.cwd())
    conversion.finish(steps_of(table.name))
    config = conversion.config()
    found = conversion.entries
    leaves = [foreign.written.get(leaf, leaf) for leaf in foreign.leaves()]
    entries = [found[leaf] for leaf in leaves] + [entry for key, entry in found.items() if key not in set(leaves)]
    valid, notes = check(config)
    unsupported = [entry for entry in entries if entry.status in (Status.LATER, Status.UNKNOWN)]
    missing = [" ".join(f"{entry.key} ({entry.status}: {entry.note})".split()) for entry in unsupported]
    text = to_yaml(config, conversion.sources, table.title, path.name, missing)
    return Converted(table.title, entries, unsupported, config, text, notes, valid)


def check(config: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether the config composes, with the plugins that are installed."""
    from pegbox.plan import compose

    missing = [name for name in config["plugins"] if name not in discover()]
    if missing:
        packages = " ".join(f"pegbox-{name}" for name in missing)
        return True, [f"Not checked: {', '.join(missing)} not installed. Type: pip install {packages}"]
    try:
        compose(config)
    except PegboxError as error:
        return False, ["Pegbox does not accept the new config yet:", str(error)]
    return True, ["Pegbox accepts the new config; `pegbox plan` shows the run."]
