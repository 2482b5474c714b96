"""Whether the installed libraries lie within the ranges that the distributions of Pegbox declare.

pip checks this when it installs; `--no-deps`, a later `pip install` of something else, and editable checkouts make it
untrue.
"""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, version

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from pegbox_doctor.distributions import CORE, installed_copies
from pegbox_doctor.report import Report

LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "datasets",
    "gguf",
    "huggingface-hub",
    "numpy",
    "peft",
    "pluggy",
    "pydantic",
    "safetensors",
    "tokenizers",
    "transformers",
    "triton",
    "trl",
    "typer",
    "vllm",
)
"""Shown when installed; torch is shown with the accelerators."""


def check_requirements(report: Report) -> None:
    """Show the versions of libraries, and find those that a distribution of Pegbox does not admit."""
    for name in LIBRARIES:
        if installed := installed_version(name):
            report.fact("Libraries", name, installed)
    wanted: dict[str, list[tuple[str, SpecifierSet]]] = {}
    for name, copies in installed_copies().items():
        for requirement in declared(copies[0]):
            wanted.setdefault(canonicalize_name(requirement.name), []).append((name, requirement.specifier))
    for library, ranges in sorted(wanted.items()):
        _check(report, library, ranges)


def declared(distribution: Distribution) -> list[Requirement]:
    """What a distribution needs here, without its extras. The kernel itself checks which core a plugin admits."""
    is_plugin = any(entry.group == "pegbox" for entry in distribution.entry_points)
    found = []
    for text in distribution.requires or ():
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        here = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if here and not (is_plugin and canonicalize_name(requirement.name) == CORE):
            found.append(requirement)
    return found


def installed_version(name: str) -> str | None:
    """The version of a distribution; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _check(report: Report, library: str, ranges: list[tuple[str, SpecifierSet]]) -> None:
    installed = installed_version(library)
    outside = [
        (name, specifier)
        for name, specifier in ranges
        if installed is None or not specifier.contains(installed, prereleases=True)
    ]
    if not outside:
        return
    together = SpecifierSet(",".join(str(specifier) for _, specifier in ranges if str(specifier)))
    who = ", ".join(f"{name} ({specifier or 'any version'})" for name, specifier in outside)
    report.problem(
        f"{library} {installed} is outside the range of {who}"
        if installed
        else f"{library} is missing; needed by {who}",
        "It was installed with --no-deps, or something else changed it since.",
        f"Type: pip install '{library}{together}'",
    )
