"""Discovery: what is installed, without importing any of it, and the import of the plugins that a config lists.

An installed plugin is an entry point in the group `pegbox`; a local one is a `.py` file beside the config that defines
`class Plugin`. Installed is not active: nothing here runs a plugin's code before the config lists it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path
from traceback import extract_tb
from types import ModuleType
from typing import Any

from pegbox import __version__
from pegbox.errors import PegboxError, did_you_mean, fail

LOCAL_CLASS = "Plugin"


@dataclass(frozen=True)
class Installed:
    """One plugin that could be activated: its name, the object it names, and the distribution that brings it.

    `content` tells the source of a local plugin apart from any other.
    """

    name: str
    value: str
    distribution: str
    version: str = ""
    requires: tuple[str, ...] = ()
    content: str = ""

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".strip()


def discover(group: str = "pegbox") -> dict[str, list[Installed]]:
    """Every entry point of a group by name. Two distributions under one name are both listed: activation refuses them.

    Reads the `*.dist-info` folders on the path (PEP 376) as importlib.metadata does, in a tenth of its time: help and
    plan ask at every start.
    """
    found: dict[str, list[Installed]] = {}
    seen: set[str] = set()
    for folder in (folder for root in sys.path for folder in sorted(Path(root).glob("*.dist-info"))):
        distribution = folder.name.partition("-")[0].lower().replace(".", "_")
        if distribution in seen:
            continue
        seen.add(distribution)
        section = "\n" + _text(folder / "entry_points.txt").partition(f"[{group}]\n")[2]
        lines = [line for line in section.partition("\n[")[0].splitlines() if "=" in line.partition("#")[0]]
        about = _text(folder / "METADATA").partition("\n\n")[0] if lines else ""
        fields = [line.partition(": ") for line in reversed(about.splitlines())]
        first = {"Name": distribution, "Version": "?", **{key: text for key, _, text in fields}}
        requires = tuple(text for key, _, text in reversed(fields) if key == "Requires-Dist")
        for name, _, value in (line.partition("=") for line in lines):
            plugin = Installed(name.strip(), value.strip(), first["Name"], first["Version"], requires)
            found.setdefault(plugin.name, []).append(plugin)
    return found


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def load(name: str, installed: Mapping[str, list[Installed]], folder: Path) -> tuple[Installed, object]:
    """Import one listed plugin and make its instance."""
    if local := name.endswith(".py"):
        plugin = _local(name, folder)
    elif name not in installed:
        raise fail("plugin-missing", name=name, hint=did_you_mean(name, installed, "Installed:"))
    else:
        check_api(plugin := only(name, installed[name]))
    module_name, _, attribute = plugin.value.partition(":")
    try:
        module = _import_file(folder / name, module_name) if local else importlib.import_module(module_name)
        factory = getattr(module, attribute or LOCAL_CLASS, None)
        if factory is not None:
            return plugin, factory()
    except PegboxError:
        raise
    except Exception as error:
        frame = extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
        raise fail("plugin-broken", name=plugin.name, origin=plugin, problem=problem, value=plugin.value) from error
    raise fail("plugin-no-class", name=plugin.name, origin=plugin, attribute=attribute or LOCAL_CLASS)


def only(name: str, found: Sequence[Installed], what: str = "plugin") -> Installed:
    """The one that a name stands for; two are an error when the name is used."""
    if len(found) > 1:
        both = " and ".join(map(str, found))
        raise fail("name-ambiguous", what=what, name=name, both=both, last=found[-1].distribution)
    return found[0]


def _local(name: str, folder: Path) -> Installed:
    if not (folder / name).is_file():
        hint = did_you_mean(name, [f"./{path.name}" for path in folder.glob("*.py")], "Files there:")
        raise fail("plugin-file-missing", name=name, folder=folder, hint=hint)
    path = (folder / name).resolve()
    content = hashlib.blake2b(path.read_bytes(), digest_size=4).hexdigest()
    return Installed(path.stem, f"pegbox_local_{path.stem}:{LOCAL_CLASS}", f"file {path.name}", content=content)


def _import_file(path: Path, module_name: str) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(module_name, path.resolve())
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_api(plugin: Installed, core_version: str = __version__) -> None:
    """Refuse a plugin whose declared requirement on pegbox-core does not admit this core.

    pip checks this at installation; `--no-deps` and editable installs drift, so it is checked again here.
    """
    for requirement in plugin.requires:
        match = re.match(r"pegbox[-_.]core(?![\w.-])\s*(?:\[[^]]*])?\s*\(?([^;)@]*)", requirement, re.IGNORECASE)
        if match and not admits(match[1], core_version):
            raise fail("plugin-api", plugin=plugin, wanted=match[1].strip(), have=core_version)


def admits(specifiers: str, version: str) -> bool:
    """Whether a release satisfies comma-separated specifiers (PEP 440); one that is not understood admits nothing."""
    compare = {">=": ge, ">": gt, "<=": le, "<": lt, "==": eq, "!=": ne}
    parts = re.findall(r"[^,\s][^,]*", re.sub(r"~=\s*([\d.]+)\.(\d+)", r">=\1.\2,==\1.*", specifiers))
    for clause in (re.fullmatch(r"(>=|<=|==|!=|<|>)\s*([\d.]+?)(\.\*)?\s*", part) for part in parts):
        width = clause[2].count(".") + 1 if clause and clause[3] else 3
        if clause is None or not compare[clause[1]](_release(version)[:width], _release(clause[2])[:width]):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(number) for number in [*re.findall(r"\d+", version), "0", "0", "0"][:3])
