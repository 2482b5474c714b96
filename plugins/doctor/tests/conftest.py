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
from pegbox.cli import main
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
        """Write the module `fake_module` (unless `code` is None) and a dist-info that names it; the dist-info."""
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
        """The single new problem; it says more than what is wrong, and these words."""
        (problem,) = self.problems(config, overrides)
        text = "\n".join((problem.what, problem.why, problem.next))
        assert [word for word in words if word not in text] == [], text
        assert problem.what
        assert problem.why or problem.next
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
def visit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`pegbox doctor --json`, as the console script runs it: exit code and report."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["pegbox", "doctor", "--json", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def check_alone(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run one check in a process of its own, with further environment variables; its report."""

    def run(check: str, *arguments: str, **variables: str) -> dict[str, Any]:
        program = (
            "import json; from pegbox.plan import compose; from pegbox_doctor import accelerators, hub, plugins; "
            "from pegbox_doctor.report import Report; report = Report(); "
            f"{check}; print(json.dumps(report.to_json()))"
        )
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env={**inherited, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
