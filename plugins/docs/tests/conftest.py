"""A real installed plugin made of files: a package and the dist-info that an installer would write, on `sys.path`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pegbox.cli import main

PLUGIN = '''"""A plugin of a test."""

from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import ConfigSection


class TallyConfig(Section):
    """Counting."""

    every: int = setting(10, "How often it counts.", unit="steps", ge=1)


class TallyPlugin:
    @hookimpl
    def register_config(self):
        return ConfigSection(schema=TallyConfig)

    @hookimpl
    def on_event(self, ctx, event):
        return None
'''


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder for `sys.path` that holds the installed plugin `tally` of the distribution `pegbox-tally`."""
    folder = tmp_path / "site"
    info = folder / "pegbox_tally-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "pegbox_tally.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pegbox-tally\nVersion: 1.0\nSummary: Counts steps.\n")
    (info / "entry_points.txt").write_text("[pegbox]\ntally = pegbox_tally:TallyPlugin\n")
    return folder


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder of packages that holds the source of `tally`: a pyproject.toml and a README with markers."""
    package = tmp_path / "packages" / "tally"
    package.mkdir(parents=True)
    (package / "pyproject.toml").write_text(
        '[project]\nname = "pegbox-tally"\n\n[project.entry-points.pegbox]\ntally = "pegbox_tally:TallyPlugin"\n'
    )
    (package / "README.md").write_text(
        "# pegbox-tally\n\nBefore.\n\n<!-- config -->\nold\n<!-- /config -->\n\nAfter.\n"
    )
    return package.parent


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def pegbox(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Done]]:
    """Run `pegbox` as the console script does, in a folder of its own; each call imports the plugin anew."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def run(*arguments: str) -> Done:
        sys.modules.pop("pegbox_tally", None)
        monkeypatch.setattr(sys, "argv", ["pegbox", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    yield run
    sys.modules.pop("pegbox_tally", None)
