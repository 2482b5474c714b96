"""The installed distributions of Pegbox: one copy of each, as its source says, imported from where it lies.

What an installer wrote down (`importlib.metadata`) and what Python imports can part: a checkout was moved, a version
changed without a new `pip install -e`, a second copy lies in another folder of `sys.path`, an uninstallation was cut
off.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import pegbox
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from pegbox_doctor.report import Report

GROUPS = ("pegbox", "pegbox.commands", "pegbox.recipes")
CORE = "pegbox-core"


def installed_copies() -> dict[str, list[Distribution]]:
    """Every distribution of Pegbox, or with an entry point for it, by name: its copies in the order of `sys.path`."""
    found: dict[str, dict[str, Distribution]] = {}
    for copy in distributions():
        if copy.read_text("METADATA"):
            name = canonicalize_name(copy.metadata["Name"])
            if (
                name == "pegbox"
                or name.startswith("pegbox-")
                or any(entry.group in GROUPS for entry in copy.entry_points)
            ):
                found.setdefault(name, {}).setdefault(str(copy.locate_file("")), copy)
    return {name: list(copies.values()) for name, copies in sorted(found.items())}


def check_distributions(report: Report) -> None:
    """List the distributions of Pegbox, and find those whose files and metadata do not agree."""
    copies = installed_copies()
    for name, found in copies.items():
        source = editable_source(found[0])
        report.fact("Pegbox", name, f"{found[0].version}" + (f" (editable: {source})" if source else ""))
        if len(found) > 1:
            _report_copies(report, name, found)
        if source:
            _check_source(report, name, found[0], source)
        _check_imports(report, name, found[0], source)
    _check_core(report, copies)
    for folder in half_removed():
        report.problem(
            f"{folder} is left over from an installation that was not removed completely",
            "It holds no metadata, so nothing can tell what it is.",
            f"Delete it: rm -r '{folder}'",
        )


def _report_copies(report: Report, name: str, found: list[Distribution]) -> None:
    places = " and ".join(f"{copy.version} in {copy.locate_file('')}" for copy in found)
    report.problem(
        f"{name} is installed {len(found)} times: {places}",
        "Python imports the first one on sys.path; which one that is depends on how it is started.",
        f"Type: pip uninstall {name}   (again until none is left), then install it once.",
    )


def editable_source(distribution: Distribution) -> Path | None:
    """The folder that an editable installation points to."""
    try:
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    except json.JSONDecodeError:
        return None
    url = urlsplit(str(origin.get("url", "")))
    if not origin.get("dir_info", {}).get("editable") or url.scheme != "file":
        return None
    return Path(url2pathname(unquote(url.path)))


def _check_source(report: Report, name: str, distribution: Distribution, source: Path) -> None:
    if not source.is_dir():
        report.problem(
            f"{name} is installed from {source}, which does not exist any more",
            "An editable installation imports from its source folder.",
            f"Type: pip uninstall {name}, or pip install -e with the new place of the folder.",
        )
        return
    file = source / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {}) if file.is_file() else {}
    changed = list(_changes(distribution, project))
    if changed:
        report.problem(
            f"{name} was installed before {file} changed: {'; '.join(changed)}",
            "An editable installation follows the code, but not its metadata.",
            f"Type: pip install -e {source}",
        )


def _changes(distribution: Distribution, project: Mapping[str, Any]) -> Iterator[str]:
    if "version" in project and project["version"] != distribution.version:
        yield f"version {distribution.version} is {project['version']} now"
    if "dependencies" in project:
        then, now = _plain(distribution.requires or []), _plain(project["dependencies"])
        if then != now:
            yield f"dependencies changed ({', '.join(sorted(then ^ now))})"
    entry_points = {(entry.group, entry.name, entry.value) for entry in distribution.entry_points}
    for group in GROUPS:
        then_entries = {(name, value) for of, name, value in entry_points if of == group}
        now_entries = set(project.get("entry-points", {}).get(group, {}).items())
        if project and then_entries != now_entries:
            names = sorted({name for name, _ in then_entries ^ now_entries})
            yield f"entry points of {group} changed ({', '.join(names)})"


def _plain(requirements: list[str]) -> set[str]:
    """Requirements without extras' own, spelled one way."""
    found = set()
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            found.add(text)
            continue
        if "extra ==" not in str(requirement.marker or ""):
            found.add(str(requirement))
    return found


def _check_imports(report: Report, name: str, distribution: Distribution, source: Path | None) -> None:
    modules = {entry.module.partition(".")[0] for entry in distribution.entry_points if entry.group in GROUPS}
    places = [Path(str(distribution.locate_file(""))).resolve(), *([source.resolve()] if source else [])]
    for module in sorted(modules):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            continue
        origin = Path(spec.origin).resolve()
        if not any(origin.is_relative_to(place) for place in places):
            report.problem(
                f"{module} of {name} is imported from {origin}, not from {places[-1]}",
                "Another folder of sys.path, such as the current one, holds a package of that name.",
                f"Start from another folder, or rename {origin.parent}.",
            )


def _check_core(report: Report, copies: Mapping[str, list[Distribution]]) -> None:
    place = Path(pegbox.__file__).parent
    if CORE not in copies:
        report.problem(
            f"pegbox is imported from {place}, but {CORE} is not installed",
            "Plugins are found through the metadata of what is installed.",
            f"Type: pip install -e {place.parent}",
        )
    elif copies[CORE][0].version != pegbox.__version__:
        report.problem(
            f"the core that runs is {pegbox.__version__} ({place}), but {CORE} {copies[CORE][0].version} is installed",
            "Its code and its metadata come from two versions.",
            f"Type: pip install --force-reinstall {CORE}",
        )


def half_removed() -> list[Path]:
    """Metadata folders of Pegbox without metadata: what is left when pip was interrupted."""
    folders = [folder for place in dict.fromkeys(sys.path) for folder in Path(place or ".").glob("*egbox*.dist-info")]
    return sorted(folder for folder in folders if not (folder / "METADATA").is_file())
