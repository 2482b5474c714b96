"""Weights, duplicates, order and dry runs: exact, seeded, and counted."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from pegbox.errors import ConfigError


def rows(count: int, name: str = "") -> list[dict[str, str]]:
    return [{"prompt": "n", "completion": f"{name}{i}"} for i in range(count)]


@pytest.fixture
def told(workspace, caplog):
    caplog.set_level(logging.INFO, logger="pegbox")

    def words(data: object, split: str = "train", seed: int = 0) -> list[str]:
        examples = workspace.examples(data, split, seed=seed)
        return [] if examples is None else [word.removesuffix("<|im_end|>") for word in workspace.words(examples)]

    words.said = lambda: "\n".join(record.getMessage() for record in caplog.records)
    return words


def entry(path: str, **keys: object) -> dict[str, object]:
    return {"path": path, "format": "completion", **keys}


@pytest.mark.parametrize("weight", [0.25, 0.5, 1, 1.5, 3, 2.33])
def test_a_weight_is_how_often_each_row_is_used(weight, workspace, told):
    workspace.write("a.jsonl", rows(100, "a"))
    workspace.write("b.jsonl", rows(10, "b"))
    data = {"train": [entry("a.jsonl", weight=weight), entry("b.jsonl")]}
    used = Counter(told(data))
    from_a = {word: count for word, count in used.items() if word[0] == "a"}
    assert sum(from_a.values()) == round(weight * 100)
    assert len(from_a) == min(100, round(weight * 100))
    assert set(from_a.values()) <= {int(weight), int(weight) + 1} - {0}
    assert {word: count for word, count in used.items() if word[0] == "b"} == {f"b{i}": 1 for i in range(10)}


def test_the_choice_by_weight_depends_on_the_seed_and_the_entry_alone(workspace, told):
    workspace.write("a.jsonl", rows(100, "a"))
    alone = told({"train": [entry("a.jsonl", weight=0.3)]})
    workspace.write("b.jsonl", rows(50, "b"))
    both = told({"train": [entry("a.jsonl", weight=0.3), entry("b.jsonl", weight=0.3)]})
    assert both[:30] == alone
    assert alone == sorted(alone, key=lambda word: int(word[1:]))
    assert told({"train": [entry("a.jsonl", weight=0.3)]}, seed=1) != alone


def test_only_the_first_of_equal_rows_remains_over_all_entries(workspace, told):
    workspace.write("a.jsonl", [*rows(5), *rows(3)])
    workspace.write("b.jsonl", [{**row, "id": index} for index, row in enumerate(rows(7))])
    data = {"train": [entry("a.jsonl"), entry("b.jsonl")], "deduplicate": True}
    assert told(data) == [str(i) for i in range(7)]
    assert "train: 8 rows dropped: the same tokens as an earlier row" in told.said()
    assert len(told({**data, "deduplicate": False})) == 15


def test_rows_with_the_same_tokens_and_other_masks_are_not_equal(workspace):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    twice = [*messages, *messages]
    untrained = [*messages, messages[0], {**messages[1], "train": False}]
    workspace.write("rows.jsonl", [{"messages": twice}, {"messages": untrained}, {"messages": twice}])
    assert len(workspace.examples("{train: [{path: rows.jsonl}], deduplicate: true}")) == 2


def test_held_out_rows_have_no_duplicate_in_training(workspace, told):
    workspace.write("a.jsonl", rows(20) * 3)
    data = {"train": [entry("a.jsonl")], "deduplicate": True, "eval_rows": 30}
    train, held_out = told(data), told(data, "eval")
    assert not set(train) & set(held_out)
    assert sorted(train + held_out, key=int) == [str(i) for i in range(20)]


def test_weights_do_not_touch_held_out_rows(workspace, told):
    workspace.write("a.jsonl", rows(40))
    plain = {"train": [entry("a.jsonl")], "eval_rows": 10}
    weighted = {"train": [entry("a.jsonl", weight=2)], "eval_rows": 10}
    assert told(weighted, "eval") == told(plain, "eval")
    assert Counter(told(weighted)) == Counter(told(plain) * 2)


def test_shuffling_merges_the_entries_in_a_seeded_order(workspace, told):
    workspace.write("a.jsonl", rows(30, "a"))
    workspace.write("b.jsonl", rows(30, "b"))
    data = {"train": [entry("a.jsonl"), entry("b.jsonl")], "shuffle": True}
    first = told(data)
    assert first == told(data)
    assert first != told(data, seed=1)
    assert sorted(first) == sorted([*(f"a{i}" for i in range(30)), *(f"b{i}" for i in range(30))])
    assert {word[0] for word in first[:10]} == {"a", "b"}


def test_a_dry_run_takes_few_rows_of_every_entry_and_split(workspace, told):
    workspace.write("a.jsonl", rows(50, "a"))
    workspace.write("b.jsonl", rows(50, "b"))
    workspace.write("c.jsonl", rows(50, "c"))
    data = {"train": [entry("a.jsonl"), entry("b.jsonl")], "eval": [entry("c.jsonl")], "limit": 6}
    assert len(told(data)) == 6
    assert {word[0] for word in told(data)} == {"a", "b"}
    assert told(data, "eval") == [f"c{i}" for i in range(6)]
    held_out = {"train": [entry("a.jsonl")], "eval_rows": 20, "limit": 4}
    assert (len(told(held_out)), len(told(held_out, "eval"))) == (4, 4)


def test_a_dry_run_reads_no_more_than_it_needs(workspace, told):
    workspace.write("a.jsonl", [*rows(5), "never read"])
    assert len(told({"train": [entry("a.jsonl")], "limit": 5})) == 5


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("{train: [{path: a.jsonl}], streaming: true, deduplicate: true}", "deduplicate and streaming"),
        ("{train: [{path: a.jsonl}], streaming: true, shuffle: true}", "shuffle and streaming"),
        ("{train: [{path: a.jsonl}], streaming: true, eval_fraction: 0.1}", "held out of a stream"),
        ("{train: [{path: a.jsonl}], streaming: true, eval_rows: 5}", "held out of a stream"),
        ("{train: [{path: a.jsonl, weight: 2.0}], streaming: true}", "weight and streaming"),
        ("{train: [{path: a.jsonl, share: 1.0}, {path: b.jsonl}], streaming: true}", "some entries have a share"),
        ("{train: [{path: a.jsonl, share: 1.0}]}", "share is set without streaming"),
        ("{train: [{path: a.jsonl}], max_length: 5, min_length: 6}", r"min_length \(6\) is greater"),
        ("{train: [{path: a.jsonl}], overlong: split}", "overlong is split, but max_length is not set"),
        ("{train: [{path: a.jsonl}], workers: 0}", "workers is less than 1"),
        ("{train: [{format: chat}]}", "data.train.0.path"),
        ("{train: [{path: a.jsonl, split: 'train[a:b]'}]}", r"split is 'train\[a:b\]'"),
        ("{train: [{path: a.jsonl, revision: main}]}", "revision means nothing"),
        ("{train: [{path: a.jsonl, options: {turn: last}}]}", "unknown key 'turn' in the options of the format 'chat'"),
        ("{train: [{source: synthetic, source_options: {words: 3, turns: 5}}]}", "less than one for each message"),
    ],
)
def test_what_cannot_be_is_an_error_before_anything_is_read(data, problem, workspace):
    workspace.write("a.jsonl", "no JSON")
    with pytest.raises(ConfigError, match=problem):
        workspace.examples(data)
