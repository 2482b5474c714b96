"""The catalog of errors: every entry is used, every use has an entry and fills in all of its words."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pegbox
import pytest
from pegbox.errors import KINDS, PegboxError, RunError, UserError, catalog, did_you_mean, fail, nearest

SOURCES = sorted(Path(pegbox.__file__).parent.rglob("*.py"))
ENTRIES = catalog()


def placeholders(entry: dict[str, str]) -> set[str]:
    """The names in braces of all parts of an entry."""
    texts = (entry.get(part, "") for part in ("what", "why", "next"))
    return {re.split(r"[.\[]", name)[0] for text in texts for _, name, _, _ in Formatter().parse(text) if name}


def keywords_of(call: ast.Call, function: ast.AST) -> set[str]:
    """The names that a call passes by keyword, those of `**mapping` included: its literal is in the same function."""
    names = {keyword.arg for keyword in call.keywords if keyword.arg}
    for spread in (keyword.value for keyword in call.keywords if not keyword.arg):
        literals = [spread]
        if isinstance(spread, ast.Name):
            assigned = (node for node in ast.walk(function) if isinstance(node, ast.Assign))
            literals = [node.value for node in assigned if ast.unparse(node.targets[0]) == spread.id]
        keys = [key for literal in literals if isinstance(literal, ast.Dict) for key in literal.keys]
        assert keys, f"line {call.lineno}: cannot tell what **{ast.unparse(spread)} holds"
        names |= {ast.literal_eval(key) for key in keys}
    return names


def uses() -> Iterator[tuple[str, str, set[str]]]:
    """(id, file:line, names passed) of each call of `fail` in the core; a conditional id counts for both."""
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for function in functions:
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "fail" and call.args:
                    ids = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
                    ids = [name for name in ids if name in ENTRIES or (isinstance(name, str) and "-" in name)]
                    for name in ids:
                        yield name, f"{path.name}:{call.lineno}", keywords_of(call, function)


USES = list(uses())


def test_the_scan_sees_the_calls_of_the_core() -> None:
    assert len(USES) > 40
    assert {place.split(":")[0] for _, place, _ in USES} >= {"kernel.py", "config.py", "source.py", "patches.py"}


def test_every_error_that_is_raised_is_in_the_catalog() -> None:
    assert {f"{name} ({place})" for name, place, _ in USES if name not in ENTRIES} == set()


def test_every_error_in_the_catalog_is_raised_somewhere() -> None:
    assert set(ENTRIES) - {name for name, _, _ in USES} == set()


@pytest.mark.parametrize(("name", "place", "passed"), USES, ids=[f"{place}-{name}" for name, place, _ in USES])
def test_every_word_in_braces_is_filled_in(name: str, place: str, passed: set[str]) -> None:
    assert placeholders(ENTRIES[name]) - passed == set()


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_has_a_known_kind_says_what_is_wrong_and_what_comes_next(name: str) -> None:
    entry = ENTRIES[name]
    assert set(entry) <= {"kind", "what", "why", "next"}
    assert entry["kind"] in KINDS
    assert entry["what"]
    tells_in_full_itself = {"values-clash", "mistakes"}
    assert name in tells_in_full_itself or entry.get("why") or entry.get("next")


class Filled:
    """A value for a placeholder, whole, by an attribute or by an index: it prints its word."""

    def __init__(self, word: str) -> None:
        self._word = word

    def __getattr__(self, name: str) -> Filled:
        return self

    def __getitem__(self, index: int) -> Filled:
        return self

    def __repr__(self) -> str:
        return f"<{self._word}>"


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_becomes_an_error_of_its_kind_with_three_parts(name: str) -> None:
    values = {word: Filled(word) for word in placeholders(ENTRIES[name])}
    error = fail(name, **values)
    assert type(error) is KINDS[ENTRIES[name]["kind"]]
    assert str(error).splitlines()[0] == error.what.splitlines()[0]
    assert all(str(value) in str(error) for value in values.values())
    assert "{" not in str(error).replace("use: {", "").replace("{'<job>'", "")


def test_wrong_input_ends_with_2_and_a_failed_run_with_1() -> None:
    assert {name for name, kind in KINDS.items() if kind.exit_code == 2} == set(KINDS) - {"run"}
    assert all(issubclass(kind, UserError) for name, kind in KINDS.items() if name != "run")
    assert (RunError.exit_code, PegboxError.exit_code) == (1, 1)


def test_an_error_survives_the_way_between_processes() -> None:
    error = fail("state-twice", key="a/b")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.what, copy.why, copy.next, str(copy)) == (error.what, error.why, error.next, str(error))


def test_an_error_of_one_part_has_one_line() -> None:
    assert str(UserError("only what")) == "only what"
    assert str(UserError("what", next="next")) == "what\nnext"


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("ouput", ["output", "seed", "plugins"], ["output"]),
        ("rslora", ["use_rslora", "r", "alpha"], ["use_rslora"]),
        ("LORA", ["lora", "sft"], ["lora"]),
        ("zzz", ["lora", "sft"], []),
        ("", ["lora", "sft"], []),
        ("plugin", ["plugins", "plugin", "plug"], ["plugin", "plugins", "plug"]),
        ("weigths", ["weights", "weight", "w", "width", "wights"], ["weights", "wights", "weight"]),
    ],
)
def test_the_nearest_names_come_best_first_and_are_few(name: str, known: list[str], found: list[str]) -> None:
    assert nearest(name, known) == found


def test_without_a_near_name_all_known_ones_are_listed() -> None:
    assert did_you_mean("zzz", ["b", "a"], "Known:") == "Known: a, b."
    assert did_you_mean("zzz", [], "Known:") == "Known: none."
    assert did_you_mean("plugin", ["plugins", "plug"]) == "Did you mean 'plugins' or 'plug'?"
