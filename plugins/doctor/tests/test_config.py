"""With a config the doctor says what would stop its run, in the words of the run itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Clinic, Site

Visit = Callable[..., tuple[int, dict[str, Any]]]
Check = Callable[..., dict[str, Any]]

OWNERS = """from pegbox.hooks import SPECS, hookimpl, semantics
from pegbox.types import Item


class Plugin:
    @hookimpl
    def register_items(self):
        return [Item(kind=kind, name="transformers", target=None) for kind in ("model_format", "export_format")]


def owner(name, spec):
    arguments = spec.__code__.co_varnames[: spec.__code__.co_argcount]
    made = eval(f"lambda self, {', '.join(arguments)}: None")
    made.__name__ = name
    return hookimpl(made)


for name, spec in SPECS.items():
    if semantics(name) == "own":
        setattr(Plugin, name, owner(name, spec))
"""
"""A local plugin that owns every job, so that a config of one plugin is complete."""


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "owners.py").write_text(OWNERS)
    (tmp_path / "model").mkdir()
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: model}\nplugins: [./owners.py]\noutput: run\n")
    return str(path)


def test_a_config_that_could_run_is_no_problem(clinic: Clinic, config: str) -> None:
    assert clinic.problems(config) == []


def test_a_mistake_in_a_config_is_a_problem_with_its_line(clinic: Clinic, config: str) -> None:
    Path(config).write_text("model: {nmae: model}\nplugins: [./owners.py]\n")
    clinic_problems = clinic.problems(config)
    assert "config.yaml:1" in clinic_problems[0].what


def test_a_missing_config_is_a_problem(clinic: Clinic) -> None:
    (problem,) = clinic.problems("no-such.yaml")
    assert "no-such.yaml" in problem.what


def test_a_job_that_nobody_does_is_a_problem(clinic: Clinic, config: str) -> None:
    clinic.one_problem("no active plugin owns", config=config, overrides=["plugins=[]"])


def test_a_broken_plugin_that_the_config_lists_is_told_once(clinic: Clinic, site: Site, config: str) -> None:
    site.install(code="import no_such_module")
    clinic.one_problem("plugin 'fake'", "no_such_module", config=config, overrides=["plugins=[fake]"])


def test_a_taken_output_folder_is_a_problem(clinic: Clinic, config: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    clinic.one_problem("already holds a run", "resume=auto", config=config)
    assert clinic.problems(config, ["resume=auto"]) == []
    assert clinic.problems(config, ["output=other"]) == []


def cached(hub: Path, name: str) -> None:
    """A repository in the cache of the hub, laid out as its documentation says."""
    folder = hub / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    commit = folder / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")


def test_a_model_that_is_nowhere_while_the_hub_is_off_is_found(check_alone: Check, config: str, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    cached(tmp_path / "home", "some/cached")
    off = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}

    def look(name: str) -> dict[str, Any]:
        return check_alone(f"hub.check_model(report, compose({config!r}, ['model.name={name}']).config)", **off)

    (problem,) = look("some/model")["problems"]
    assert "some/model is not in the cache" in problem["what"]
    assert look("some/cached")["problems"] == []
    assert look("some/cached")["facts"]["Hub"]["model"] == "some/cached (in the cache)"
    assert look("model") == {"healthy": True, "facts": {}, "notes": [], "problems": []}


def test_the_exit_code_says_whether_there_are_problems(visit: Visit, config: str) -> None:
    for arguments in ((), (config,), ("no-such.yaml",)):
        code, report = visit(*arguments)
        assert code == (1 if report["problems"] else 0)
        assert report["healthy"] is (code == 0)
    assert json.dumps(report["problems"]).count("no-such.yaml") == 1
