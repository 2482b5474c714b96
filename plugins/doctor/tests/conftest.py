"""Installed distributions made of files, as an installer would leave them, broken in the way that a test wants."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pegbox_doctor.report import Finding
from pegbox_doctor.visit import examine

PLUGIN = """from pegbox.hooks import hookimpl


class FakePlugin:
    @hookimpl
    def on_event(self, ctx, event):
        return None
"""


@dataclass
class Site:
    """A folder of `sys.path`."""

    folder: Path

    def install(
        self,
        name: str = "pegbox-fake",
        version: str = "1.0",
        *,
        entry_points: str = "[pegbox]\nfake = fake_module:FakePlugin\n",
        requires: Sequence[str] = (),
        source: Path | None = None,
        code: str | None = PLUGIN,
    ) -> Path:
        """Write the module `fake_module` (unless `code` is None) and a dist-info that names it; the dist-info folder."""
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(entry_points)
        if source is not None:
            origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
            (info / "direct_url.json").write_text(json.dumps(origin))
        if code is not None:
            (self.folder / "fake_module.py").write_text(code)
        return info


@dataclass
class Clinic:
    """What the doctor finds here beyond what was there before the test broke something."""

    known: list[Finding] = field(default_factory=list)

    def problems(self, config: str | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
        return [problem for problem in examine(config, overrides).problems if problem not in self.known]

    def one_problem(self, *words: str, config: str | None = None, overrides: Sequence[str] = ()) -> Finding:
        """The single new problem; it says all three parts, and these words."""
        (problem,) = self.problems(config, overrides)
        text = "\n".join((problem.what, problem.why, problem.next))
        assert [word for word in words if word not in text] == [], text
        assert problem.what
        assert problem.why
        return problem


@pytest.fixture
def clinic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Clinic]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Clinic(examine().problems)
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


@pytest.fixture
def add_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Site]:
    """A new folder at the front of `sys.path`."""

    def add(name: str) -> Site:
        (tmp_path / name).mkdir()
        monkeypatch.syspath_prepend(tmp_path / name)
        return Site(tmp_path / name)

    return add


@pytest.fixture
def site(clinic: Clinic, add_site: Callable[[str], Site]) -> Site:
    return add_site("site")


@pytest.fixture
def visit(tmp_path: Path) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`pegbox doctor --json` in a process of its own, with further environment variables: exit code and report."""

    def run(*arguments: str, **variables: str) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "pegbox", "doctor", "--json", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=False
        )
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    return run
