"""Every page: links lead somewhere, commands exist, Python parses, the reference is what the code says."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pegbox.config import CORE_KEYS
from pegbox_kernels.harness import table

LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
CODE = re.compile(r"^(`{3,}).*?^\1[ ]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
DECISION_PARTS = ["Context", "Options", "Decision", "What would change our mind"]
SHELL = {"sh", "console", ""}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", CODE.sub(lambda match: match[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    """Relative links of a page that lead to no file, or to no heading of one."""
    for match in LINK.finditer(CODE.sub("", page.read_text())):
        address, _, anchor = match["target"].partition("#")
        if re.match(r"\w+:", address):
            continue
        target = (page.parent / address).resolve() if address else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield match["target"]


def test_every_relative_link_leads_to_a_file_and_a_heading(root: Path, pages: list[Path]) -> None:
    found = {str(page.relative_to(root)): list(broken_links(page)) for page in pages}
    assert {page: links for page, links in found.items() if links} == {}


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A heading: with `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-heading-with-code) [c](https://example.org) `[d](none.md)`\n"
        "[e](none.md) [f](other.md#none)\n"
    )
    assert list(broken_links(page)) == ["none.md", "other.md#none"]


def command_lines(blocks: Callable[[Path], list[Any]], pages: list[Path]) -> Iterator[tuple[str, list[str]]]:
    """Each line of a shell block as its words, without its comment."""
    for page in pages:
        for block in blocks(page):
            if block.language in SHELL and "file" not in block.options:
                for line in block.body.splitlines():
                    words = line.removeprefix("$ ").partition("  #")[0].split()
                    yield f"{block.where}: {line}", words


def test_every_target_of_make_and_every_command_that_a_page_names_exists(
    root: Path, pages: list[Path], blocks: Callable[[Path], list[Any]]
) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    groups = [
        tomllib.loads(path.read_text())["project"].get("entry-points", {}) for path in root.glob("plugins/*/*.toml")
    ]
    commands = {"run", "plan", "plugins", "version"} | {
        name for group in groups for name in group.get("pegbox.commands", {})
    }
    seen, unknown = 0, []
    for where, words in command_lines(blocks, pages):
        for program, known in (("make", targets), ("pegbox", commands)):
            if words[:1] == [program] and len(words) > 1 and not words[1].startswith("-"):
                seen += 1
                unknown += [where] * (words[1] not in known)
    assert seen > 20
    assert unknown == []


def test_every_folder_and_extra_of_a_pip_line_exists(
    root: Path, pages: list[Path], blocks: Callable[[Path], list[Any]]
) -> None:
    extras = set(tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    folders, wrong = 0, []
    for where, words in command_lines(blocks, [root / "README.md", *(root / "docs/howto").glob("*.md")]):
        for before, word in pairwise(words):
            if before == "-e" and "pip" in words:
                folders += 1
                path = word.strip("'").partition("[")[0]
                wrong += [f"{where}: {word}"] * (not (root / path / "pyproject.toml").is_file())
        for named in re.findall(r"(?:pegbox|\.)\[([\w,-]+)\]", " ".join(words)):
            wrong += [f"{where}: {name}" for name in named.split(",") if name not in extras]
    assert folders > 6
    assert wrong == []


def test_python_of_a_page_parses(pages: list[Path], blocks: Callable[[Path], list[Any]]) -> None:
    shown = [block for page in pages for block in blocks(page) if block.language == "python"]
    assert shown
    for block in shown:
        if re.match(r"[a-z_]+\(", block.body) and "->" in block.body:
            continue  # a signature by itself, at the top of the page of a hook
        ast.parse(block.body, filename=block.where)


def test_the_reference_is_what_the_code_says(root: Path) -> None:
    command = ["docs", "--write", "docs/reference", "--packages", "plugins", "--packages", "contrib", "--check"]
    done = subprocess.run(
        [sys.executable, "-m", "pegbox", *command], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_page_of_kernel_figures_is_what_the_results_say(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table.main([str(root / "kernels/benchmarks/results")])
    said = capsys.readouterr().out
    assert (root / "docs/explanation/kernel-figures.md").read_text() == said, "type: make docs"


def test_decisions_are_numbered_listed_and_complete(root: Path) -> None:
    found = sorted((root / "docs" / "adr").glob("[0-9]*.md"))
    assert [int(path.name[:4]) for path in found] == list(range(1, len(found) + 1))
    index = (root / "docs" / "adr" / "index.md").read_text()
    for path in found:
        text = path.read_text()
        title = text.splitlines()[0].removeprefix("# ")
        assert f"[{title}]({path.name})" in index
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == DECISION_PARTS


def test_the_architecture_page_counts_the_keys_of_the_core(root: Path) -> None:
    assert {"extends"}.isdisjoint(CORE_KEYS)
    words = ["seven", "eight", "nine", "ten", "eleven"]
    assert (
        f"The core has {words[len(CORE_KEYS) + 1 - 7]} keys" in (root / "docs/explanation/architecture.md").read_text()
    )


@pytest.mark.parametrize("name", ["tutorial", "howto", "explanation", "adr", "reference"])
def test_every_page_can_be_reached_from_the_readme(root: Path, name: str) -> None:
    reached, waiting = set(), [root / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = (match["target"].partition("#")[0] for match in LINK.finditer(CODE.sub("", page.read_text())))
        waiting += [path for target in targets if target and (path := (page.parent / target).resolve()).is_file()]
    assert {path for path in (root / "docs" / name).rglob("*.md") if path not in reached} == set()
