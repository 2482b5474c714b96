"""Files and functions that a reader can take in at once, and a core that stays tiny."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from code_lines import code_lines, core_files

CORE_CODE_LINES = 1550
STORY_LINES = 80
FUNCTION_LINES = 60
TRITON_KERNEL_LINES = 120


def file_budget(path: Path) -> int:
    if {"tests", "testing"} & set(path.parts):
        return 600
    return 700 if "kernels" in path.parts else 400


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, lines and budget of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            source = " ".join(map(ast.unparse, node.decorator_list))
            triton = "triton.jit" in source or "gluon.jit" in source
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield (
                f"{path}:{node.lineno} {node.name}",
                lines,
                TRITON_KERNEL_LINES if triton else FUNCTION_LINES,
            )


def test_a_statement_counts_its_lines_and_a_docstring_or_comment_none() -> None:
    function = 'def f():\n    """Doc\n    more."""\n    return (\n        x\n    )\n'
    assert code_lines(f'"""Doc."""\n\nx = 1  # why\n# comment\n{function}') == 5


def test_the_core_is_at_most_1550_code_lines(root: Path) -> None:
    lines = {path: code_lines(path.read_text()) for path in core_files(root)}
    listing = "\n".join(f"{count:5} {path.relative_to(root)}" for path, count in lines.items())
    assert sum(lines.values()) <= CORE_CODE_LINES, f"{sum(lines.values())} code lines:\n{listing}"


def test_the_story_of_a_run_is_under_80_lines(root: Path) -> None:
    assert len((root / "core/pegbox/run.py").read_text().splitlines()) < STORY_LINES


def test_no_file_is_longer_than_its_budget(root: Path, python_files: list[Path]) -> None:
    lengths = {path.relative_to(root): len(path.read_text().splitlines()) for path in python_files}
    assert {path: lines for path, lines in lengths.items() if lines > file_budget(path)} == {}


def test_no_function_is_longer_than_its_budget(python_files: list[Path]) -> None:
    found = [found for path in python_files for found in functions(path)]
    assert found
    assert [f"{name}: {lines} > {budget}" for name, lines, budget in found if lines > budget] == []
