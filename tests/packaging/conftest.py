"""Wheels built once, and clean virtual environments outside the checkout to try them in.

A clean environment must hold a wheel and what that wheel declares, nothing more: only so is a plugin
caught that leans on what another one happens to bring. Installing torch anew for each would take hours
and gigabytes, so third-party distributions are not installed but lent. `Environment.lend` computes the
closure of the declared requirements (markers evaluated, versions checked) over what is installed here,
and links exactly those distributions' top-level entries, as their RECORD lists them, into the new
environment. There they look installed: to imports, to `importlib.metadata`, and to pip. Our own wheels
are really installed, by pip.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Iterable
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from conftest import Member

PREFIX = "pegbox"


def clean_variables(index: bool) -> dict[str, str]:
    """The environment variables of a child process: none that change Python, Triton or, without `index`, pip."""
    dropped = ("PYTHON", "VIRTUAL_ENV", "TRITON_") if index else ("PYTHON", "VIRTUAL_ENV", "TRITON_", "PIP_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    return {**kept, "PYTHONNOUSERSITE": "1", "COLUMNS": "200", "NO_COLOR": "1"} | (
        {} if index else {"PIP_CONFIG_FILE": os.devnull}
    )


def pip(*arguments: str, index: bool = False) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, env=clean_variables(index), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"pip {' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def closure(requirements: Iterable[str]) -> set[str]:
    """The third-party distributions that the requirements need, directly or not; all are installed here."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if not name.startswith(PREFIX):
            version = distribution(name).version
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} is not met by {version}"
            found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in distribution(name).requires or ()]
    return found


class Environment:
    """A new virtual environment in `folder`. Commands run in it know nothing of the checkout."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.folder = folder
        self.bin = folder / "venv" / "bin"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")

    def lend(self, requirements: Iterable[str]) -> set[str]:
        """Make the closure of the requirements visible; the names of the distributions."""
        names = closure(requirements)
        for name in names:
            found = distribution(name)
            entries = {Path(file).parts[0] for file in found.files or ()} - {"..", "__pycache__"}
            for entry in entries:
                if not (self.site / entry).exists():
                    (self.site / entry).symlink_to(Path(str(found.locate_file(entry))).resolve())
        return names

    def install(
        self, *wheels: Path | str, index: bool = False, options: tuple[str, ...] = ("--no-deps", "--no-index")
    ) -> None:
        pip("--python", str(self.bin / "python"), "install", *options, *map(str, wheels), index=index)

    def distributions(self, prefix: str = "") -> set[str]:
        """Names of what is installed, lent or real."""
        found = (canonicalize_name(PathDistribution(path).name) for path in self.site.glob("*.dist-info"))
        return {name for name in found if name.startswith(prefix)}

    def run(self, *command: str, rc: int = 0) -> str:
        """Run a program of the environment; its standard output, and standard error if it should fail."""
        full = [str(self.bin / command[0]), *command[1:]]
        variables = clean_variables(index=False) | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(full, cwd=self.folder, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == rc, f"{' '.join(command)} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if rc else "")

    def conforms(self, *tests: str) -> None:
        """Run tests with the pytest of the environment. Only what computes with a missing library may be skipped."""
        options = ("-q", "-rs", "-p", "no:cacheprovider", "--import-mode=importlib")
        report = self.run("python", "-m", "pytest", *options, *tests)
        skipped = [line for line in report.splitlines() if line.startswith("SKIPPED")]
        assert [line for line in skipped if "not installed" not in line] == []
        assert " passed" in report

    def plugins(self) -> set[str]:
        """The installed plugins, as the core finds them."""
        return set(self.run("python", "-c", "from pegbox.discovery import discover; print(*discover())").split())


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Build wheels of source folders, from copies: a build must not see leftovers, nor leave any."""

    def build_wheels(*folders: Path) -> list[Path]:
        work = tmp_path_factory.mktemp("build")
        sources = []
        for number, folder in enumerate(folders):
            sources.append(work / str(number) / folder.name)
            shutil.copytree(folder, sources[-1], ignore=shutil.ignore_patterns(".*", "__pycache__", "dist", "runs"))
        pip(
            "wheel",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--wheel-dir",
            str(work / "dist"),
            *map(str, sources),
        )
        return sorted((work / "dist").glob("*.whl"))

    return build_wheels


@pytest.fixture(scope="session")
def wheels(build: Callable[..., list[Path]], root: Path, members: list[Member]) -> dict[str, Path]:
    """Every wheel of the repository by distribution, the umbrella among them."""
    built = build(root, *(member.folder for member in members))
    found = {canonicalize_name(path.name.partition("-")[0]): path for path in built}
    assert set(found) == {member.distribution for member in members} | {PREFIX}
    return found


@pytest.fixture(scope="session")
def third_party(build: Callable[..., list[Path]], root: Path) -> Path:
    (wheel,) = build(root / "examples" / "third-party-plugin")
    return wheel


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)
