"""`pegbox data inspect` shows the answers of a row side by side, and which of them is wanted."""

from __future__ import annotations

import json

import pytest
from pegbox.hooks import hookimpl
from pegbox.types import Processor
from pegbox_data.inspecting import inspected_in
from pegbox_data.viewing import shown_rows

LONG = "It is four, I think so, and you? " * 4
ROW = {"prompt": "what is\nthe answer?", "chosen": LONG.strip(), "rejected": "日本 less"}


class TokenizerPlugin:
    """Owns `load_processor`, so that no model is needed."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    @hookimpl
    def load_processor(self, ctx) -> Processor:
        return Processor(tokenizer=self.tokenizer, pad_id=0, fingerprint="tiny")


@pytest.fixture
def look(workspace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def inspect(row, form, **data):
        workspace.write("rows.jsonl", [row])
        plugins = {"tokens": TokenizerPlugin(workspace.tokenizer)}
        options = data.pop("options", {})
        section = {"train": [{"path": "rows.jsonl", "format": form, "options": options}], **data}
        return list(inspected_in(workspace.context(section, plugins), "train", 9))

    return inspect


def test_chosen_and_rejected_stand_side_by_side_behind_their_prompt(look, capsys):
    seen = look(ROW, "preference")
    assert not shown_rows(seen, as_json=False)
    shown = capsys.readouterr().out.split("\n")
    assert shown[1:4] == ["<|im_start|>user", "what is", "the answer?<|im_end|>"]
    head = next(index for index, line in enumerate(shown) if line.startswith("chosen ("))
    left, right = shown[head].split("│")
    assert "chosen" in left
    assert "rejected" in right
    columns = [line.split("│") for line in shown[head + 1 :] if "│" in line]
    sides = ["".join(parts[side].rstrip("\n") for parts in columns if len(parts) > side) for side in (0, 1)]
    assert "".join(sides[0].split()) == "⟦" + "".join(LONG.split()) + "<|im_end|>⟧↵"
    assert "".join(sides[1].split()) == "⟦日本less<|im_end|>⟧↵"
    assert all(len(line) <= 80 for line in shown[head:-4])
    assert "\x1b" not in "".join(shown)


def test_colours_take_the_place_of_marks_on_a_terminal(look, monkeypatch):
    import sys

    from pegbox_data.pairwise import answers

    (seen,) = look(ROW, "preference")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = "\n".join(answers(seen))
    assert "\x1b[32m" in shown
    assert "⟦" not in shown


def test_a_row_with_a_label_says_whether_it_is_wanted(look, capsys):
    for label, words in ((True, "  wanted, "), (False, "  not wanted, ")):
        shown_rows(look({"prompt": "a", "completion": "b", "label": label}, "unpaired"), as_json=False)
        shown = capsys.readouterr().out
        assert words in shown
        assert "<|im_start|>assistant\n⟦b<|im_end|>⟧" in shown


def test_both_rows_of_a_pair_are_shown_where_it_becomes_two(look, capsys):
    seen = look(ROW, "unpaired", options={"unpair": True})
    assert [one.signs for one in seen] == [(1,), (-1,)]
    assert [one.where for one in seen] == ["rows.jsonl:1"] * 2


def test_prompts_are_shown_and_stop_nothing(look, capsys):
    assert not shown_rows(look({"prompt": "a"}, "prompts"), as_json=False)
    shown = capsys.readouterr().out
    assert shown.count("<|im_start|>assistant\n") == 1
    assert "⟦" not in shown


def test_json_tells_documents_and_signs(look, capsys):
    seen = look(ROW, "preference")
    shown_rows(seen, as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert made["signs"] == [1, -1]
    assert sum(made["documents"]) == len(made["input_ids"]) == len(made["labels"])


@pytest.mark.parametrize(
    ("rule", "length", "stops"),
    [
        ({}, "left out", False),
        ({"overlong": "truncate"}, "cut off", False),
        ({"overlong": "truncate", "max_length": 12}, "leaves no room for an answer", False),
        ({"overlong": "error"}, "left out", True),
    ],
)
def test_what_the_length_rule_does_to_a_pair_is_said(rule, length, stops, look):
    (seen,) = look(ROW, "preference", **{"max_length": 40, **rule})
    assert length in seen.length
    assert seen.stops is stops


def test_what_stops_a_pair_says_which_answer_it_is(look):
    silent = [{"role": "assistant", "content": "b", "train": False}]
    row = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{**silent[0], "train": True}], "rejected": silent}
    (seen,) = look(row, "preference")
    assert seen.stops
    (found,) = [one for one in seen.findings if one.id == "no-trained-token"]
    assert found.detail.startswith("rejected: ")
