"""What lies in the repository: its root, its packages, the files that git knows or would know."""

from __future__ import annotations

import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Member:
    """One distribution of the repository. `package` is what it is imported as; the umbrella has none."""

    folder: Path
    distribution: str
    package: str
    project: dict

    @property
    def kind(self) -> str:
        """core, kernels, plugins or contrib: the first folder below the root."""
        return self.folder.relative_to(ROOT).parts[0]

    @property
    def plugins(self) -> dict[str, str]:
        """Entry points of the group `pegbox`: name to class."""
        return self.project.get("entry-points", {}).get("pegbox", {})


def read_member(folder: Path) -> Member:
    settings = tomllib.loads((folder / "pyproject.toml").read_text())
    (package,) = settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    return Member(folder, settings["project"]["name"], package, settings["project"])


def repository_members() -> list[Member]:
    found = [*ROOT.glob("plugins/*/pyproject.toml"), *ROOT.glob("contrib/*/pyproject.toml")]
    return [
        read_member(folder) for folder in (ROOT / "core", ROOT / "kernels", *(path.parent for path in sorted(found)))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `member` runs for each distribution; `plugin_member`: for each with a plugin."""
    for name, wanted in (("member", True), ("plugin_member", False)):
        if name in metafunc.fixturenames:
            members = [member for member in repository_members() if wanted or member.plugins]
            metafunc.parametrize(name, members, ids=[member.distribution for member in members])


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def members() -> list[Member]:
    return repository_members()


@pytest.fixture(scope="session")
def files() -> list[Path]:
    """Every file that is tracked, or new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in sorted(listed.split("\0")) if name and (path := ROOT / name).is_file()]


@pytest.fixture(scope="session")
def python_files(files: list[Path]) -> list[Path]:
    return [path for path in files if path.suffix == ".py" and "scaffold" not in path.parts]
