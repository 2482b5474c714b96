"""Rules of the source that no linter of the usual kind knows. Tests and templates are free of them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LAUNCHER = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""What torchrun and accelerate set for each process: their protocol, not our configuration."""
OTHERS = {
    *("TRITON_INTERPRET", "CUBLAS_WORKSPACE_CONFIG", "PYDANTIC_DISABLE_PLUGINS", "TOKENIZERS_PARALLELISM"),
    *("XDG_CACHE_HOME", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "VLLM_ENABLE_V1_MULTIPROCESSING"),
}
"""Switches of other libraries that can be reached in no other way."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of attributes, or an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := dotted(node.value)):
        return f"{left}.{node.attr}"
    return ""


def generated_code(tree: ast.Module) -> Iterator[ast.AST]:
    """`exec`, `eval`, and reading source code at run time."""
    forbidden = {"exec", "eval", "inspect.getsource", "inspect.getsourcelines", "linecache.getlines"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in forbidden:
            yield node


def environment_as_config(tree: ast.Module) -> Iterator[ast.AST]:
    """A named environment variable is read or set, other than those of the launchers."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and dotted(node.value) in {"os.environ", "environ"}:
            key: ast.AST = node.slice
        elif (
            isinstance(node, ast.Call)
            and node.args
            and dotted(node.func)
            in {
                "os.environ.get",
                "environ.get",
                "os.environ.setdefault",
                "os.getenv",
            }
        ):
            key = node.args[0]
        else:
            continue
        if not (isinstance(key, ast.Constant) and key.value in LAUNCHER | OTHERS):
            yield node


def module_level_state(tree: ast.Module) -> Iterator[ast.AST]:
    """An empty container at module level waits to be filled; `global` rebinds a name of the module."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            value = node.value
            empty = isinstance(value, ast.Dict) and not value.keys
            empty |= isinstance(value, ast.List) and not value.elts
            empty |= isinstance(value, ast.Call) and not value.args and dotted(value.func) in {"dict", "list", "set"}
            if empty:
                yield node
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.Global))


def relative_or_star_import(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names)):
            yield node


RULES = [generated_code, environment_as_config, module_level_state, relative_or_star_import]


@pytest.fixture(scope="module")
def sources(root: Path, python_files: list[Path]) -> list[Path]:
    """The files of packages and examples, without their tests."""
    return [path for path in python_files if "tests" not in path.relative_to(root).parts]


@pytest.mark.parametrize("rule", RULES, ids=[rule.__name__ for rule in RULES])
def test_no_source_breaks_the_rule(
    rule: Callable[[ast.Module], Iterator[ast.AST]], root: Path, sources: list[Path]
) -> None:
    found = []
    for path in sources:
        found += [f"{path.relative_to(root)}:{node.lineno}" for node in rule(ast.parse(path.read_text()))]
    assert found == []


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (generated_code, "import inspect\ninspect.getsource(print)"),
        (generated_code, "exec('x = 1')"),
        (environment_as_config, "import os\nos.environ['PEGBOX_LEVEL']"),
        (environment_as_config, "import os\nos.getenv('HOME')"),
        (environment_as_config, "import os\nos.environ.get(name)"),
        (module_level_state, "REGISTRY = {}"),
        (module_level_state, "def f():\n    global count\n    count = 1"),
        (relative_or_star_import, "from . import config"),
        (relative_or_star_import, "from pegbox.hooks import *"),
    ],
)
def test_the_rule_sees_what_it_is_there_for(rule: Callable[[ast.Module], Iterator[ast.AST]], source: str) -> None:
    assert list(rule(ast.parse(source)))


def test_a_module_says_what_it_is(root: Path, sources: list[Path]) -> None:
    silent = [
        path for path in sources if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert [str(path.relative_to(root)) for path in silent] == []
