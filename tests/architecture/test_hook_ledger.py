"""Hooks are a promise to people we do not know: a change is seen in review, as a change of `hooks.txt`.

After a change that is meant:

    python tests/architecture/test_hook_ledger.py > tests/architecture/hooks.txt
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from pegbox.hooks import SPECS, VERBS, semantics

LEDGER = Path(__file__).with_name("hooks.txt")


def ledger() -> str:
    """One line for each hook, in the order of a run: its semantics, its signature without module prefixes."""
    lines = (f"{semantics(name):10}{name}{inspect.signature(spec)}\n" for name, spec in SPECS.items())
    return "".join(re.sub(r"'|\b\w+\.", "", line) for line in lines)


def test_every_hook_is_as_the_ledger_says() -> None:
    assert ledger() == LEDGER.read_text(), f"a hook changed; if it is meant, follow {Path(__file__).name}"


def test_exactly_the_owned_hooks_stop_at_the_first_answer() -> None:
    for name, spec in SPECS.items():
        assert spec.pegbox_spec["firstresult"] is (semantics(name) == "own"), name


def test_no_hook_is_untyped_or_undocumented_and_every_verb_is_used() -> None:
    for name, spec in SPECS.items():
        annotations = [part.annotation for part in inspect.signature(spec).parameters.values()]
        annotations.append(inspect.signature(spec).return_annotation)
        assert inspect.Signature.empty not in annotations, name
        assert not any("Any" in str(annotation) for annotation in annotations), name
        assert inspect.getdoc(spec), name
    assert {name.split("_", 1)[0] for name in SPECS} == set(VERBS)


if __name__ == "__main__":
    print(ledger(), end="")
