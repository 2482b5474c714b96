"""What the distribution of a plugin is called, requires and contains."""

from __future__ import annotations

import json
import re
from importlib.metadata import Distribution
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pegbox.discovery import admits
from pegbox.errors import PluginError
from pegbox.section import Section
from pegbox.testing.rule import require
from pegbox.testing.subject import Subject

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
CONFIG_MARKERS = ("<!-- config -->", "<!-- /config -->")


def has_one_name(subject: Subject) -> None:
    """The entry point, the section of the config and the end of the distribution's name are the same word."""
    name, distribution = subject.plugin, re.sub(r"[-_.]+", "-", subject.installed.distribution).lower()
    why = "Whoever reads `plugins: [x]` types `pip install pegbox-x` and writes a section `x`."
    require(
        NAME.fullmatch(name) is not None,
        f"the entry point is named '{name}'",
        why,
        "Use lower-case letters, digits and single hyphens.",
    )
    require(
        distribution == f"pegbox-{name}",
        f"the entry point is named '{name}', but its distribution is '{subject.installed.distribution}'",
        why,
        f"Name the distribution pegbox-{name}, or the entry point {distribution.removeprefix('pegbox-')}.",
    )
    package = f"pegbox_{name.replace('-', '_')}"
    require(
        subject.package == package,
        f"the entry point '{name}' names an object in the package '{subject.package}'",
        why,
        f"Name the package {package}.",
    )


def requires_the_core(subject: Subject) -> None:
    """The distribution says which versions of the core it was written for, and this is one of them."""
    from pegbox import __version__

    requirements = [re.sub(r"[()\s]", "", text.partition(";")[0]) for text in subject.distribution.requires or ()]
    found = [
        match[1] for text in requirements if (match := re.fullmatch(r"pegbox[-_.]core(?:\[.*\])?([^a-z].*)?", text))
    ]
    why = "The version of the core is the version of the hooks; a plugin for another one must be refused by name."
    fix = "Write into dependencies: pegbox-core>=0.1,<0.2"
    require(bool(found), f"{subject.installed} does not require pegbox-core", why, fix)
    specifiers = found[0] or ""
    require(
        any(part.startswith(("<", "~=", "==")) for part in specifiers.split(",")),
        f"{subject.installed} requires 'pegbox-core{specifiers}', which has no upper bound",
        why,
        fix,
    )
    require(
        admits(specifiers, __version__),
        f"{subject.installed} requires 'pegbox-core{specifiers}', but this is {__version__}",
        why,
        "Test the plugin with the version it asks for, or widen the requirement.",
    )


def is_typed(subject: Subject) -> None:
    """The package ships its types."""
    require(
        (subject.folder / "py.typed").is_file(),
        f"{subject.package} has no file py.typed",
        "Without it type checkers ignore the annotations of an installed package.",
        f"Add an empty file {subject.package}/py.typed; check that the wheel holds it.",
    )


def has_a_readme(subject: Subject) -> None:
    """The distribution ships a README; if the plugin has a section, one marked place in it explains its settings."""
    text = _readme(subject.distribution)
    why = "The README is what a package index shows, and where the settings are looked up."
    require(
        text.lstrip().startswith("#"),
        f"{subject.installed} has no README that begins with a heading",
        why,
        'Write README.md and, into pyproject.toml: readme = "README.md"',
    )
    schema = _schema(subject)
    if schema is None:
        return
    opening, closing = CONFIG_MARKERS
    require(
        text.count(opening) == text.count(closing) == 1 and text.index(opening) < text.index(closing),
        f"the README of {subject.installed} has no place for the settings between '{opening}' and '{closing}'",
        why,
        "Put the two markers around the table of settings, each on a line of its own.",
    )
    table = text.partition(opening)[2].partition(closing)[0].strip()
    absent = [name for name in schema.model_fields if table and f"`{name}`" not in table]
    require(
        not absent,
        f"the table of settings in the README of {subject.installed} leaves out: {', '.join(absent)}",
        why,
        "Write the table anew; it names each setting in backticks.",
    )


def _readme(distribution: Distribution) -> str:
    """The README: of an editable installation the file as it is now, else what the metadata holds."""
    direct = json.loads(distribution.read_text("direct_url.json") or "{}")
    if direct.get("dir_info", {}).get("editable"):
        written = Path(url2pathname(urlsplit(direct["url"]).path)) / "README.md"
        if written.is_file():
            return written.read_text(encoding="utf-8")
    return str(distribution.metadata.json.get("description", ""))


def _schema(subject: Subject) -> type[Section] | None:
    if subject.group != "pegbox":
        return None
    try:
        return subject.schema()
    except PluginError:
        return None
