"""Each wheel alone, each extra, the bare core, an outsider's plugin, in environments with what was declared.

How third-party distributions get into them without being installed again is told in `conftest.py`.
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pegbox.hooks import SPECS

if TYPE_CHECKING:
    from conftest import Environment, Member

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

IMPORT_ALL = """
import importlib, pkgutil, sys
top = importlib.import_module(sys.argv[1])
print(top.__name__)
for module in pkgutil.walk_packages(top.__path__, top.__name__ + "."):
    if not module.name.startswith(("pegbox.testing", "pegbox.scaffold")):
        importlib.import_module(module.name)
        print(module.name)
"""
"""Prints every module it imported. The conformance kit is left out: it wants pytest."""


def own(requirements: list[str]) -> list[str]:
    """Distributions of ours among the requirements."""
    names = (canonicalize_name(Requirement(text).name) for text in requirements)
    return [name for name in names if name.startswith("pegbox")]


def extras(root: Path) -> dict[str, list[str]]:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]


@pytest.fixture
def quickstart(environment: Environment, root: Path) -> str:
    """The quickstart's config and data, copied beside the environment."""
    shutil.copytree(
        root / "examples" / "quickstart",
        environment.folder / "quickstart",
        ignore=shutil.ignore_patterns("runs"),
    )
    return "quickstart/config.yaml"


def test_a_wheel_alone_imports_and_conforms_with_what_it_declares(
    environment: Environment, member: Member, wheels: dict[str, Path]
) -> None:
    dependencies = member.project.get("dependencies", [])
    environment.lend(dependencies)
    needed = {member.distribution, *own(dependencies)}
    environment.install(*(wheels[name] for name in needed))
    assert environment.distributions("pegbox") == needed

    modules = environment.run("python", "-I", "-c", IMPORT_ALL, member.package).split()
    assert len(modules) >= len(list((member.folder / member.package).glob("*.py")))
    if "pegbox-core" in needed:
        assert environment.plugins() == set(member.plugins)
    if member.plugins:
        environment.lend(["pegbox-core[testing]"])
        shutil.copytree(member.folder / "tests", environment.folder / "tests")
        environment.conforms("tests/test_conformance.py")


def test_an_extra_brings_exactly_its_packages(
    environment: Environment, root: Path, wheels: dict[str, Path], members: list[Member]
) -> None:
    brings = {name: {"pegbox", "pegbox-core", *own(texts)} for name, texts in extras(root).items()}
    brings["all"] = set(wheels)
    declared = {member.distribution: member.project.get("dependencies", []) for member in members}
    environment.lend(text for texts in declared.values() for text in texts)
    index = str(wheels["pegbox"].parent)
    for extra, packages in brings.items():
        needed = packages | {name for package in packages for name in own(declared.get(package, []))}
        report = environment.folder / f"{extra}.json"
        options = ("--dry-run", "--no-index", "--find-links", index, "--report", str(report))
        environment.install(f"pegbox[{extra}]", options=options)
        chosen = {canonicalize_name(item["metadata"]["name"]) for item in json.loads(report.read_text())["install"]}
        assert chosen == needed, extra


def test_all_extras_from_wheels_plan_the_quickstart(
    environment: Environment, root: Path, wheels: dict[str, Path], members: list[Member], quickstart: str
) -> None:
    environment.lend(text for member in members for text in member.project.get("dependencies", []))
    environment.install("pegbox[all]", options=("--no-index", "--find-links", str(wheels["pegbox"].parent)))
    assert environment.distributions("pegbox") == set(wheels)
    assert environment.plugins() == {name for member in members for name in member.plugins}
    listed = json.loads(environment.run("pegbox", "plugins", "--json"))
    assert {plugin["name"] for plugin in listed} == environment.plugins()
    assert "lora" in environment.run("pegbox", "plan", quickstart)

    (environment.site / "pegbox_lora-0.1.0.dist-info").rename(environment.folder / "uninstalled")
    message = environment.run("pegbox", "plan", quickstart, rc=2)
    assert "pip install 'pegbox[lora]'" in message
    assert "Traceback" not in message


def test_the_bare_core_from_an_index_knows_its_commands_and_no_torch(
    environment: Environment, wheels: dict[str, Path]
) -> None:
    environment.install(wheels["pegbox-core"], index=True, options=())
    assert environment.distributions() & {"torch", "transformers", "numpy", "pytest"} == set()
    assert {"pluggy", "pydantic", "pyyaml", "typer"} <= environment.distributions()
    assert "plan" in environment.run("pegbox", "--help")
    assert "0.1.0" in environment.run("pegbox", "version")
    assert environment.plugins() == set()
    (environment.folder / "config.yaml").write_text("model: {name: some/model}\nplugins: [lora]\n")
    message = environment.run("pegbox", "plan", "config.yaml", rc=2)
    assert "pip install 'pegbox[lora]'" in message
    assert "Traceback" not in message


def test_a_plugin_of_an_outsider_is_found_planned_and_conforms(
    environment: Environment,
    root: Path,
    wheels: dict[str, Path],
    third_party: Path,
    members: list[Member],
    quickstart: str,
) -> None:
    environment.lend(
        [
            "pegbox-core[testing]",
            *(text for member in members for text in member.project.get("dependencies", [])),
        ]
    )
    environment.install(*wheels.values(), third_party)
    assert "cosine-reward" in environment.plugins()

    before = json.loads(environment.run("pegbox", "plan", quickstart, "--json"))
    assert "cosine-reward" not in json.dumps(before)
    config = environment.folder / "quickstart" / "with-reward.yaml"
    plugins = [plugin["name"] for plugin in before["plugins"]]
    config.write_text(f"extends: config.yaml\nplugins: {json.dumps([*plugins, 'cosine-reward'])}\n")
    after = json.loads(environment.run("pegbox", "plan", str(config), "--json"))
    assert ["cosine-reward"] in [hook["plugins"] for hook in after["hooks"] if hook["hook"] == "score_rollouts"]

    shutil.copytree(root / "examples" / "third-party-plugin" / "tests", environment.folder / "tests")
    environment.conforms("tests")


def test_the_scaffold_makes_a_plugin_for_each_hook_that_builds_installs_and_conforms(
    environment: Environment, build: Callable[..., list[Path]], wheels: dict[str, Path]
) -> None:
    environment.lend(["pegbox-core[testing]", "pegbox-doctor", "torch", "transformers"])
    environment.install(wheels["pegbox-core"], wheels["pegbox-doctor"])
    names = {f"my-{hook.replace('_', '-')}" for hook in SPECS}
    for hook in SPECS:
        environment.run("pegbox", "plugins", "new", f"my-{hook.replace('_', '-')}", "--hook", hook)
    environment.install(*build(*(environment.folder / f"pegbox-{name}" for name in sorted(names))))
    assert environment.plugins() == names
    environment.conforms(*(f"pegbox-{name}/tests" for name in sorted(names)))
