"""`pegbox docs NAME` shows the reference of anything that has a name, and says what was meant if nothing has it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pegbox
import pytest
from pegbox.errors import catalog
from pegbox.hooks import SPECS
from pegbox_docs.command import topic
from pegbox_docs.type_pages import documented_types

Run = Callable[..., Any]


def written_signatures() -> dict[str, list[str]]:
    """The hooks and their arguments as the source file spells them, read without importing it."""
    tree = ast.parse((Path(pegbox.__file__).parent / "hooks.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {f.name: [a.arg for a in f.args.args] for f in functions if f.name in SPECS}


@pytest.mark.parametrize("hook", SPECS)
def test_a_hook_has_its_signature_its_words_and_its_semantics(hook: str) -> None:
    text = topic(hook)
    signature = next(line for line in text.splitlines() if line.startswith(f"{hook}("))
    arguments = signature.partition("(")[2].rpartition(") -> ")[0]
    assert [part.partition(":")[0].strip() for part in arguments.split(", ") if part] == written_signatures()[hook]
    assert (SPECS[hook].__doc__ or "").splitlines()[0].strip() in text
    assert sum(word in text for word in ("declaration", "merged", "One owner", "patches", "Fan-out", "Observers")) >= 1


def test_every_error_and_every_type_has_a_reference() -> None:
    for name in [*catalog(), *documented_types()]:
        assert f"## {name}" in topic(name)


def test_the_contents_name_every_hook_and_every_installed_plugin(pegbox: Run) -> None:
    shown = pegbox("docs").stdout
    assert [hook for hook in SPECS if f"- {hook}:" not in shown] == []
    assert "- tally: pegbox-tally 1.0" in shown


def test_a_plugin_has_its_hooks_and_its_settings(pegbox: Run) -> None:
    shown = pegbox("docs", "tally").stdout
    assert "- on_event (observe)" in shown
    assert "| `every` | integer ≥ 1 | `10` | steps | How often it counts. |" in shown


def test_a_hook_names_the_installed_plugins_that_implement_it(pegbox: Run) -> None:
    assert "- tally: Counts steps" in pegbox("docs", "on_event").stdout


def test_a_command_of_a_plugin_is_shown_like_those_of_the_core(pegbox: Run) -> None:
    shown = pegbox("docs", "commands").stdout
    for command in ("pegbox run", "pegbox plan", "pegbox docs", "pegbox schema"):
        assert f"## {command}" in shown


def test_an_unknown_name_is_a_wrong_input_with_the_nearest_name(pegbox: Run) -> None:
    done = pegbox("docs", "load_modl")
    assert done.returncode == 2
    assert "Did you mean 'load_model'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_broken_plugin_is_left_out_with_a_word_and_hides_nothing_else(pegbox: Run, site: Path) -> None:
    (site / "pegbox_tally.py").write_text("import no_such_module\n")
    done = pegbox("docs", "on_event")
    assert done.returncode == 0
    assert "on_event(ctx: Context, event: Event)" in done.stdout
    assert "plugin 'tally' (pegbox-tally 1.0) cannot be loaded" in done.stderr


def test_asking_imports_no_torch() -> None:
    program = (
        "import sys; from pegbox_docs.command import topic; topic('load_model'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def references(schema: object) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref":
                yield value
            yield from references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from references(item)


def test_a_schema_holds_core_keys_and_sections_and_every_reference_leads_somewhere(pegbox: Run) -> None:
    schema = json.loads(pegbox("schema").stdout)
    assert {"model", "plugins", "extends", "tally"} <= set(schema["properties"])
    found = set(references(schema))
    assert found
    for reference in found:
        place = schema
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_a_schema_of_named_plugins_holds_only_their_sections(pegbox: Run) -> None:
    some, none = (json.loads(pegbox("schema", *names).stdout)["properties"] for names in (["tally"], ["tally"]))
    assert some == none
    assert "tally" in some
    assert pegbox("schema", "no-such-plugin").returncode == 2
