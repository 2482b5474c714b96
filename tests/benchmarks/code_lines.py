"""Code lines: lines that hold code, without blank lines, comments and docstrings.

A statement over three lines counts three. Run by itself it prints the lines of each package:

    python tests/benchmarks/code_lines.py
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
NOT_CORE = {"testing", "scaffold", "tests"}
"""Folders of the core that its budget leaves out: the conformance kit, templates, tests."""


def code_lines(source: str) -> int:
    """How many lines of `source` hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def core_files(root: Path) -> list[Path]:
    """The files that the core's budget counts."""
    found = sorted((root / "core" / "pegbox").rglob("*.py"))
    return [path for path in found if not NOT_CORE & set(path.relative_to(root / "core" / "pegbox").parts)]


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    totals: Counter[str] = Counter()
    for path in core_files(root):
        lines = code_lines(path.read_text())
        totals["core"] += lines
        print(f"{lines:6}  {path.relative_to(root)}")
    for folder in sorted([root / "kernels", *root.glob("plugins/*"), *root.glob("contrib/*")]):
        sources = [path for path in folder.rglob("*.py") if "tests" not in path.parts]
        totals[str(folder.relative_to(root))] = sum(code_lines(path.read_text()) for path in sources)
    for name, lines in totals.items():
        print(f"{lines:6}  {name}, in all")


if __name__ == "__main__":
    main()
