"""Documentation that is executed: fenced blocks of a page, in their order, in a folder of their own.

A block whose info string names a file (```` ```python file=my_plugin.py ````) is written. A block `console` is a
session: each line that begins with `$ ` is run by a shell, and what follows it is what must be printed. A line `...`
stands for any lines or none, `...` in a line for any text in it, and the width of white space is not compared. A
command must end with exit code 0, or with the one that the block names (`exit=2`). Other blocks are only shown.

What a page installs with pip goes into a folder of its own beside the page's files, without network: the environment
that runs the tests stays as it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n]*)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.MULTILINE | re.DOTALL)


EDITABLE = "import pathlib, site; site.addsitedir(str(pathlib.Path(__file__).parent))\n"
"""Python reads the .pth files of editable installations in the folders of a site alone: make this one such a folder."""
QUIET = {
    "NO_COLOR": "1",
    "COLUMNS": "120",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its options, its text, and where it stands."""

    language: str
    options: dict[str, str]
    body: str
    where: str


@dataclass(frozen=True)
class Command:
    """One command of a session and what it must print."""

    line: str
    wanted: str


def blocks_of(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        language, *words = match["info"].split() or [""]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        line = text.count("\n", 0, match.start()) + 1
        yield Block(language, options, match["body"], f"{page.name}:{line}")


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a session."""
    _, *parts = re.split(r"^\$ ", block.body, flags=re.MULTILINE)
    for part in parts:
        line, _, wanted = part.partition("\n")
        while line.endswith("\\"):
            more, _, wanted = wanted.partition("\n")
            line = f"{line[:-1]}{more.strip()}"
        yield Command(line, wanted)


def run_block(block: Block, folder: Path) -> None:
    """Write the file of a block, or run its session."""
    if "file" in block.options:
        path = folder / block.options["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.body, encoding="utf-8")
    elif block.language == "console":
        for command in commands_of(block):
            run_command(command, folder, int(block.options.get("exit", 0)), block.where)


def apart(folder: Path) -> dict[str, str]:
    """Variables that let commands of this environment be found, and pip install into a folder of the page."""
    site = folder / ".site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(EDITABLE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    pip = {"PIP_TARGET": str(site), "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    return {"PATH": path, "PYTHONPATH": str(site), "PIP_DISABLE_PIP_VERSION_CHECK": "1", **pip}


def run_command(command: Command, folder: Path, exit_code: int, where: str) -> None:
    """Run one command and compare."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        ["bash", "-c", command.line],
        cwd=folder,
        env=inherited | QUIET | apart(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seen = done.stdout
    assert done.returncode == exit_code, f"{where}: $ {command.line}\nends with {done.returncode}:\n{seen}"
    assert was_printed(command.wanted, seen), f"{where}: $ {command.line}\nwanted:\n{command.wanted}\nseen:\n{seen}"


def was_printed(wanted: str, seen: str) -> bool:
    """Whether a command printed what its session shows; nothing shown, anything goes."""
    if not wanted.strip():
        return True
    lines = [" ".join(line.split()) for line in wanted.strip().splitlines()]
    parts = (r"(?:.*\n)*?" if line == "..." else _line_pattern(line) for line in lines)
    plain = "".join(" ".join(line.split()) + "\n" for line in seen.strip().splitlines())
    return re.fullmatch("".join(parts), plain) is not None


def _line_pattern(line: str) -> str:
    return ".*".join(re.escape(part.strip()) if part.strip() else "" for part in line.split("...")) + r"\n"


@pytest.fixture(scope="session")
def run_page() -> Callable[[Path, Path], None]:
    """Execute every block of a page in a folder."""

    def run(page: Path, folder: Path) -> None:
        for block in blocks_of(page):
            run_block(block, folder)

    return run


@pytest.fixture(scope="session")
def prints() -> Callable[[str, str], bool]:
    return was_printed


@pytest.fixture(scope="session")
def blocks() -> Callable[[Path], list[Block]]:
    return lambda page: list(blocks_of(page))


@pytest.fixture(scope="session")
def pages(root: Path, files: list[Path]) -> list[Path]:
    """Every page of markdown of the repository that a person wrote or reads."""
    return [path for path in files if path.suffix == ".md"]


@pytest.fixture(scope="session")
def tiny(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with which the tutorial begins: a tiny model, rows, a config, a plugin."""
    folder = tmp_path_factory.mktemp("tiny")
    wanted = {"make_tiny.py", "rows.jsonl", "config.yaml", "my_plugin.py"}
    for block in blocks_of(root / "docs" / "tutorial" / "first-plugin.md"):
        if block.options.get("file") in wanted:
            wanted.discard(block.options["file"])
            run_block(block, folder)
    run_command(Command("python make_tiny.py", ""), folder, 0, "first-plugin.md")
    return folder


@pytest.fixture
def workspace(tiny: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    shutil.copytree(tiny, tmp_path / "work")
    return tmp_path / "work"
