"""The length rule: every row is used, cut, split, or left out and counted."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from pegbox.errors import DataError

TEXT = "{path: rows.jsonl, format: completion, fields: {prompt: ''}, options: {chat_template: false}}"


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="pegbox")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def write_texts(workspace, lengths):
    workspace.write("rows.jsonl", [{"prompt": "", "completion": "x" * length} for length in lengths])


def test_splitting_keeps_every_token_in_order(workspace, said):
    write_texts(workspace, [5, 47, 20, 3])
    whole = workspace.examples(f"{{train: [{TEXT}]}}")
    split = workspace.examples(f"{{train: [{TEXT}], max_length: 10, overlong: split}}")
    assert max(split.lengths) == 10
    joined = [np.concatenate([rows[i].input_ids for i in range(len(rows))]) for rows in (whole, split)]
    np.testing.assert_array_equal(*joined)
    assert split.lengths.sum() == whole.lengths.sum()
    assert "2 rows split to data.max_length (10 tokens) (first: line 2)" in said()
    assert [split.describe(i) for i in range(3)] == ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:2"]


def test_parts_without_a_trained_token_are_dropped_and_counted(workspace, said):
    workspace.write("rows.jsonl", [{"prompt": "x" * 35, "completion": "y" * 4}])
    entry = "{path: rows.jsonl, format: completion, options: {chat_template: false}}"
    split = workspace.examples(f"{{train: [{entry}], max_length: 10, overlong: split}}")
    assert len(split) == 1
    assert "3 parts of split rows dropped: without a trained token (first: line 1)" in said()


def test_shorter_rows_are_dropped_and_counted(workspace, said):
    write_texts(workspace, [5, 1, 9, 2])
    examples = workspace.examples(f"{{train: [{TEXT}], min_length: 4}}")
    assert examples.lengths.tolist() == [6, 10]
    assert "2 rows dropped: shorter than data.min_length (4 tokens) (first: line 2)" in said()


def test_rows_whose_answers_are_cut_away_stop_the_run_or_are_counted_if_allowed(workspace, said):
    workspace.write("rows.jsonl", [{"prompt": "x" * length, "completion": "y"} for length in (3, 30, 4, 40)])
    entry = "{path: rows.jsonl, format: completion, options: {chat_template: false}}"
    data = f"train: [{entry}], max_length: 10, overlong: truncate"
    with pytest.raises(DataError, match=r"^rows\.jsonl:2: .*truncated-away.*first of 2 bad rows"):
        workspace.examples(f"{{{data}}}")
    assert len(workspace.examples(f"{{{data}, allow: [truncated-away]}}")) == 2
    assert "2 rows cut to data.max_length before their first trained token: dropped (first: line 2)" in said()


def test_the_length_rule_tokenizes_nothing_again(workspace, monkeypatch):
    from pegbox_data.encoding import Encoder

    write_texts(workspace, [5, 47, 20, 3])
    data = f"train: [{TEXT}], cache: kept"
    workspace.examples(f"{{{data}}}")
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    for rule in ("max_length: 10", "max_length: 10, overlong: split", "min_length: 5", "deduplicate: true"):
        assert len(workspace.examples(f"{{{data}, {rule}}}"))
