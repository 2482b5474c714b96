"""`pegbox data inspect` shows what a run would train on, and reads no more than it shows."""

from __future__ import annotations

import json

import pytest
from pegbox.errors import ConfigError
from pegbox.hooks import hookimpl
from pegbox.types import Processor
from pegbox_data.inspecting import inspected_in
from pegbox_data.viewing import shown_rows


def row(*said: str) -> dict[str, object]:
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}


class TokenizerPlugin:
    """Owns `load_processor`, so that no model is needed."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @hookimpl
    def load_processor(self, ctx) -> Processor:
        return Processor(tokenizer=self.tokenizer, pad_id=0, fingerprint="tiny")


@pytest.fixture
def look(workspace):
    def inspect(data, split="train", rows=10, number=None):
        plugins = {"tokens": TokenizerPlugin(workspace.tokenizer)}
        return list(inspected_in(workspace.context(data, plugins), split, rows, number))

    return inspect


ROWS = [row("Hi", "Hello 日本 🙂."), row("a", "b", "c"), row("only"), {"messages": []}, row("d", "e")]


def test_rows_are_those_of_a_run(workspace, look):
    good = [ROWS[0], ROWS[1], ROWS[4]]
    workspace.write("rows.jsonl", good)
    examples = workspace.examples("{train: [{path: rows.jsonl}]}")
    seen = look("{train: [{path: rows.jsonl}]}")
    assert len(seen) == len(examples) == 3
    for index, one in enumerate(seen):
        assert list(one.ids) == list(examples[index].input_ids)
        assert list(one.labels) == list(examples[index].labels)
        assert one.where == examples.describe(index)
        assert one.source == good[index]
        assert "".join(one.tokens) == workspace.tokenizer.decode(one.ids)
        assert len(one.tokens) == len(one.ids)
        assert not one.stops


def test_every_row_is_shown_whatever_is_wrong_with_it(workspace, look):
    workspace.write("rows.jsonl", ROWS)
    seen = look("{train: [{path: rows.jsonl}]}")
    assert [one.stops for one in seen] == [False, False, True, True, False]
    assert [found.id for found in seen[2].findings] == ["no-trained-token"]
    assert seen[3].error is not None
    assert "'messages' is empty" in seen[3].error.what
    assert not look("{train: [{path: rows.jsonl}], allow: [no-trained-token]}")[2].stops


def test_one_row_or_the_first_ones_are_shown(workspace, look):
    workspace.write("rows.jsonl", ROWS)
    assert [one.where for one in look("{train: [{path: rows.jsonl}]}", rows=2)] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert [one.where for one in look("{train: [{path: rows.jsonl}]}", number=5)] == ["rows.jsonl:5"]
    with pytest.raises(ConfigError, match="there is no row 9"):
        look("{train: [{path: rows.jsonl}]}", number=9)
    with pytest.raises(ConfigError, match=r"no entries in data\.eval"):
        look("{train: [{path: rows.jsonl}]}", split="eval")


@pytest.mark.parametrize(
    ("overlong", "length", "stops"),
    [
        ("drop", "left out", False),
        ("truncate", "cut off", True),
        ("split", "split into", False),
        ("error", "left out", True),
    ],
)
def test_what_the_length_rule_does_is_said(overlong, length, stops, workspace, look):
    workspace.write("rows.jsonl", [row("one two " * 20, "four")])
    (one,) = look(f"{{train: [{{path: rows.jsonl}}], max_length: 16, overlong: {overlong}}}")
    assert length in one.length
    assert one.stops is stops


def test_trained_text_stands_between_marks_where_there_are_no_colours(workspace, look, capsys):
    workspace.write("rows.jsonl", ROWS[:3])
    assert shown_rows(look("{train: [{path: rows.jsonl}]}"), as_json=False)
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦Hello 日本 🙂.<|im_end|>⟧\n" in shown
    assert "stops: no-trained-token" in shown
    assert "1 of these rows would stop a run." in shown
    assert "\x1b" not in shown


def test_json_has_one_object_for_each_row(workspace, look, capsys):
    workspace.write("rows.jsonl", ROWS)
    seen = look("{train: [{path: rows.jsonl}]}")
    shown_rows(seen, as_json=True)
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(made) == len(ROWS)
    assert made[0]["input_ids"] == list(seen[0].ids)
    assert made[0]["labels"] == list(seen[0].labels)
    assert "".join(made[0]["tokens"]) == workspace.tokenizer.decode(seen[0].ids)
    assert made[0]["source"] == ROWS[0]
    assert made[0]["findings"] == []
    assert made[2]["findings"][0]["id"] == "no-trained-token"
    assert made[2]["findings"][0]["stops"] is True
    assert made[2]["findings"][0]["fix"]
    assert made[3]["error"]["what"]
