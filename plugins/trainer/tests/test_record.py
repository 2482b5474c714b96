"""What a run keeps of itself: a config that runs from anywhere, and the contents of the files that are its plugins."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from pegbox.errors import ConfigError
from pegbox.plan import compose
from pegbox.run import execute
from tiny_runs import TINY, records, tiny_config

MARKS = """
from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, GroupOptions


class MarksConfig(Section):
    file: str = setting(..., "A file of input.")


class Plugin:
    @hookimpl
    def register_config(self):
        return ConfigSection(schema=MarksConfig)

    @hookimpl
    def configure_groups(self, ctx):
        assert ctx.config.path(ctx.section(MarksConfig).file).read_text() == "marks"
        return [GroupOptions(pattern="norm", learning_rate_scale=0.5)]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of a config, a file of input and a plugin beside it, and a run of it in `runs/first`."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/marks.py").write_text(MARKS)
    (folder / "marks.txt").write_text("marks")
    config = tiny_config(Path("runs/first"), plugins=["./marks.py"], max_steps=2, save_every=1)
    config["marks"] = {"file": "../marks.txt"}
    (folder / "configs/c.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(folder)
    execute(compose("configs/c.yaml"))
    return folder


def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_the_config_in_a_runs_folder_gives_the_same_run_from_another_folder(project, tmp_path, monkeypatch) -> None:
    elsewhere(tmp_path, monkeypatch)
    execute(compose("../project/runs/first/config.yaml", ["output=again"]))
    assert records(tmp_path / "elsewhere/again") == records(project / "runs/first")


def test_the_record_of_a_run_from_a_record_runs_too(project, tmp_path, monkeypatch) -> None:
    elsewhere(tmp_path, monkeypatch)
    execute(compose("../project/runs/first/config.yaml", ["output=again"]))
    monkeypatch.chdir(tmp_path)
    execute(compose("elsewhere/again/config.yaml", ["output=third"]))
    assert records(tmp_path / "third") == records(project / "runs/first")


def test_a_project_that_is_moved_keeps_its_records(project, tmp_path, monkeypatch) -> None:
    written = yaml.safe_load((project / "runs/first/config.yaml").read_text())
    assert written["paths_from"] == "../../configs"
    elsewhere(tmp_path, monkeypatch)
    shutil.move(project, tmp_path / "moved")
    ctx = compose(tmp_path / "moved/runs/first/config.yaml", ["output=again"])
    assert ctx.config.path("../marks.txt") == tmp_path / "moved/marks.txt"
    assert TINY in ctx.config.run.plugins
    execute(ctx)


def test_a_run_goes_on_from_its_record(project) -> None:
    ended = execute(compose("runs/first/config.yaml", ["resume=auto", "trainer.max_steps=3"]))
    assert ended.step == 3


def test_a_run_does_not_go_on_with_another_file_of_a_plugin(project) -> None:
    more = ["resume=auto", "trainer.max_steps=3"]
    changed = MARKS.replace("0.5", "0.6")
    (project / "configs/marks.py").write_text(changed)
    with pytest.raises(ConfigError, match=r"the plugin marks was file marks\.py \w+, is now file marks\.py \w+"):
        execute(compose("configs/c.yaml", more))
    (project / "configs/marks.py").write_text(MARKS)
    assert execute(compose("configs/c.yaml", more)).step == 3


def test_the_file_of_a_plugin_that_only_watches_may_change(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(Path("run"), plugins=["./watch.py"], max_steps=1)))
    watch = "from pegbox.hooks import hookimpl\nclass Plugin:\n    @hookimpl\n    def on_event(self): ...\n"
    (tmp_path / "watch.py").write_text(watch)
    execute(compose("c.yaml"))
    (tmp_path / "watch.py").write_text(watch + "# more\n")
    assert execute(compose("c.yaml", ["resume=auto", "trainer.max_steps=2"])).step == 2
