"""What the repository holds: a known top level, complete packages, one list of them wherever it is kept."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Member

TOP_LEVEL = {
    "core",
    "plugins",
    "kernels",
    "contrib",
    "tests",
    "examples",
    "docs",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
}
VAGUE = re.compile(r"(^|_)(utils?|helpers?|common|misc|managers?)(_|$)|^base_")
MACHINE_PATH = re.compile(r"/(?:home|root|work|farm|mnt|Users)/\w")
UMBRELLA = "pegbox"
PLUGINS = {
    "attention": ("attention", "gpt-oss-attention"),
    "optim": ("adamw", "optim"),
    "reference-free": ("cpo", "orpo", "simpo"),
}
"""The plugins of a distribution that brings several; each is the name of an extra too."""


@pytest.fixture(scope="module")
def settings(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def test_the_top_level_holds_what_the_design_names_and_nothing_else(root: Path, files: list[Path]) -> None:
    top = {path.relative_to(root).parts[0] for path in files}
    assert {name for name in top if not name.startswith(".")} == TOP_LEVEL


def test_no_module_has_a_name_that_says_nothing(root: Path, python_files: list[Path]) -> None:
    assert [str(path.relative_to(root)) for path in python_files if VAGUE.search(path.stem)] == []


def test_no_file_names_a_folder_of_somebodys_machine(root: Path, files: list[Path]) -> None:
    found = []
    for path in files:
        if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".jsonl", ""}:
            for number, line in enumerate(path.read_text().splitlines(), start=1):
                found += [f"{path.relative_to(root)}:{number}: {line.strip()[:80]}"] * bool(MACHINE_PATH.search(line))
    assert found == []


def test_a_package_is_typed_tested_and_explained(member: Member) -> None:
    assert (member.folder / member.package / "py.typed").is_file()
    assert list((member.folder / "tests").rglob("test_*.py"))
    assert (member.folder / "README.md").read_text().startswith("# ")


def test_a_package_is_named_after_its_folder(member: Member) -> None:
    name = member.folder.name
    assert member.distribution == f"pegbox-{name}"
    assert member.package == {"core": "pegbox"}.get(name, f"pegbox_{name.replace('-', '_')}")


def test_a_plugin_has_its_name_once_its_config_table_and_its_conformance_test(plugin_member: Member) -> None:
    folder, name = plugin_member.folder, plugin_member.folder.name
    assert tuple(plugin_member.plugins) == PLUGINS.get(name, (name,))
    readme = (folder / "README.md").read_text()
    assert readme.count("<!-- config -->") == readme.count("<!-- /config -->") == 1
    conformance = "".join(path.read_text() for path in (folder / "tests").rglob("test_conformance.py"))
    assert "PluginConformance" in conformance
    assert [plugin for plugin in plugin_member.plugins if f'plugin = "{plugin}"' not in conformance] == []


def test_every_package_declares_the_version_of_the_core_it_was_written_for(member: Member, settings: dict) -> None:
    project = member.project
    assert project["version"] == settings["project"]["version"]
    assert project["requires-python"] == settings["project"]["requires-python"]
    assert project["license"] == "Apache-2.0"
    if member.plugins:
        assert "pegbox-core>=0.1,<0.2" in project["dependencies"]


def test_no_package_depends_on_another_plugin(member: Member, members: list[Member]) -> None:
    allowed = {"core": set(), "kernels": set(), "contrib": {"pegbox-core"}}
    ours = {other.distribution for other in members} | {UMBRELLA}
    needed = {re.match(r"[\w-]+", text).group() for text in member.project.get("dependencies", [])}
    assert needed & ours <= allowed.get(member.kind, {"pegbox-core", "pegbox-kernels"})


def test_the_core_has_four_third_party_dependencies_at_most(members: list[Member]) -> None:
    (core,) = (member for member in members if member.kind == "core")
    assert len(core.project["dependencies"]) <= 4


def test_the_umbrella_has_an_extra_for_each_package_and_all_of_them_in_all(
    settings: dict, members: list[Member]
) -> None:
    extras = dict(settings["project"]["optional-dependencies"])
    names = sorted(member.folder.name for member in members if member.kind != "core")
    assert ",".join(part[len("pegbox[") : -1] for part in extras.pop("all")) == ",".join(names)
    packages = {name: name for name in names}
    packages |= {plugin: name for name, plugins in PLUGINS.items() for plugin in plugins}
    assert {name: [re.sub(r"\[.*\]", "", wanted) for wanted in extra] for name, extra in extras.items()} == {
        name: [f"pegbox-{package}>=0.1,<0.2"] for name, package in packages.items()
    }


def test_the_workspace_and_the_import_rules_name_every_package(settings: dict, members: list[Member]) -> None:
    tool = settings["tool"]
    assert set(tool["uv"]["sources"]) == {member.distribution for member in members} | {UMBRELLA}
    assert tool["importlinter"]["root_packages"] == sorted(member.package for member in members)
    core, kernels, plugins = tool["importlinter"]["contracts"][:3]
    others = {member.package for member in members if member.kind != "core"}
    assert others <= set(core["forbidden_modules"])
    assert set(kernels["forbidden_modules"]) == {member.package for member in members if member.kind != "kernels"}
    assert set(plugins["modules"]) == others - {"pegbox_kernels"}


def test_the_tested_set_pins_every_dependency(root: Path, settings: dict, members: list[Member]) -> None:
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if line and not line.startswith("#")}
    declared = settings["dependency-groups"]["dev"] + [
        text for member in members for text in member.project.get("dependencies", [])
    ]
    names = {re.match(r"[\w.-]+", text).group().lower().replace("_", "-") for text in declared}
    assert {name for name in names if not name.startswith("pegbox")} - pinned == set()
