"""A new plugin package for one hook, that installs and passes the conformance kit as it is.

The templates beside this file are rendered with the plugin's name: `package/` is the same for every hook,
`hooks/<hook>/` holds the plugin itself, which works and is meant to be changed; its `about.toml` says what it is and
needs. The name is filled in in three forms: `my-reward`, `pegbox_my_reward`, `MyReward`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from pegbox import __version__
from pegbox.config import CORE_KEYS
from pegbox.discovery import discover
from pegbox.errors import ConfigError, did_you_mean
from pegbox.hooks import SPECS

TEMPLATES = files("pegbox.scaffold").joinpath("templates")
SUFFIX = ".txt"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
PREFIX = "pegbox-"
RESERVED = (*CORE_KEYS, "extends", "pegbox")


def make_plugin(name: str, hook: str, folder: str | Path) -> str:
    """Make the package `pegbox-<name>` in a folder; what to tell the user.

    Args:
        name: the plugin's name, its key in configs.
        hook: the hook that it implements.
        folder: where the package's folder is made.

    Raises:
        ConfigError: the name cannot be a plugin's, the hook does not exist, or the package is there already.
    """
    _check_hook(hook)
    _check_name(name, hook)
    package = Path(folder) / f"{PREFIX}{name}"
    if package.exists():
        raise ConfigError(
            f"{package} exists already",
            "A new plugin never overwrites anything.",
            "Choose another name, or another --folder.",
        )
    about = tomllib.loads(TEMPLATES.joinpath("hooks", hook, "about.toml").read_text(encoding="utf-8"))
    words = _words(name, hook, about)
    module = package / words["module"]
    written = [(module / file, text) for file, text in _rendered(f"hooks/{hook}", words)]
    written.append((module / "py.typed", ""))
    _write(written)
    words["settings"] = _settings(module / "config.py", f"{words['Class']}Config")
    general = dict(_rendered("package", words))
    written = [(package / file, general[file]) for file in ("pyproject.toml", "README.md")]
    written.append((package / "tests" / "test_conformance.py", general["test_conformance.py"]))
    _write(written)
    return _message(package, words)


def _check_hook(hook: str) -> None:
    if hook not in SPECS:
        raise ConfigError(
            f"there is no hook '{hook}'", did_you_mean(hook, SPECS, "Hooks:"), "Set --hook to one of them."
        )


def _check_name(name: str, hook: str) -> None:
    again = f"pegbox plugins new NAME --hook {hook}"
    if name.startswith(PREFIX):
        raise ConfigError(
            f"'{name}' begins with {PREFIX}",
            f"The name is the key in configs; the distribution becomes {PREFIX}<name> by itself.",
            f"Type: {again.replace('NAME', name.removeprefix(PREFIX))}",
        )
    if not NAME.fullmatch(name):
        proposal = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-0123456789")
        raise ConfigError(
            f"'{name}' is no name for a plugin",
            "A name has lower-case letters, digits and single hyphens, and begins with a letter.",
            f"Type: {again.replace('NAME', proposal) if NAME.fullmatch(proposal) else again}",
        )
    if name in RESERVED:
        raise ConfigError(f"'{name}' is a key of the core", "A plugin's name is its key in configs.", f"Type: {again}")
    taken = [*map(str, discover().get(name, [])), *_installed(f"{PREFIX}{name}")]
    if taken:
        raise ConfigError(
            f"'{name}' is taken by {taken[0]}, which is installed",
            "Two plugins of one name cannot be installed side by side.",
            f"Type: {again}",
        )


def _installed(distribution: str) -> list[str]:
    try:
        return [f"{distribution} {version(distribution)}"]
    except PackageNotFoundError:
        return []


def _words(name: str, hook: str, about: dict[str, Any]) -> dict[str, str]:
    """What is filled into the templates."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    requirements = [f"pegbox-core>={major}.{minor},<{major}.{minor + 1}", *about.get("dependencies", [])]
    words = {
        "name": name,
        "hook": hook,
        "module": f"pegbox_{name.replace('-', '_')}",
        "Class": "".join(part.capitalize() for part in name.split("-")),
        "dependencies": json.dumps(requirements)[1:-1],
    }
    kits = ["PluginConformance", *about.get("kits", [])]
    words |= {"kits": ", ".join(kits), "imports": ", ".join(sorted(kits))}
    return words | {key: Template(about[key]).substitute(words) for key in ("summary", "usage", "limits")}


def _rendered(folder: str, words: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Every template of a folder, by the name of the file that it becomes."""
    for source in sorted(TEMPLATES.joinpath(folder).iterdir(), key=lambda source: source.name):
        if source.name.endswith(SUFFIX):
            text = Template(source.read_text(encoding="utf-8"))
            yield source.name.removesuffix(SUFFIX), text.safe_substitute(words)


def _write(written: list[tuple[Path, str]]) -> None:
    for path, text in written:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _settings(config: Path, section: str) -> str:
    """The settings of a section as a table for the README."""
    if not config.is_file():
        return "No settings."
    spec = importlib.util.spec_from_file_location(f"{config.parent.name}_config", config)
    assert spec is not None, "a Python file has a spec"
    assert spec.loader is not None, "a Python file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks the names in annotations up there
    try:
        spec.loader.exec_module(module)
        fields = getattr(module, section).model_json_schema()["properties"]
    finally:
        del sys.modules[spec.name]
    rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for key, field in fields.items():
        default = json.dumps(field.get("default"))
        cells = (f"`{key}`", _kind(field), f"`{default}`", field.get("unit", ""), field["description"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    names = {"string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}
    return names.get(field["type"], str(field["type"]))


def _message(package: Path, words: dict[str, str]) -> str:
    return "\n".join(
        [
            f"Made {package}: {words['summary']}",
            f"  {words['module']}/  the plugin; it implements {words['hook']} and works as it is",
            "  tests/  the rules that every plugin keeps",
            "Next:",
            f"  pip install -e '{package}[testing]'",
            f"  pytest {package}",
            f"  add {words['name']} to plugins in a config",
        ]
    )
