"""What becomes of the rows: length rule, held-out rows, kept columns, plain text, fingerprint."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from pegbox.rows import Example


def conversation(answer: str, question: str = "q") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="pegbox")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


def test_an_example_holds_ids_and_unshifted_labels(workspace):
    workspace.write("rows.jsonl", [conversation("Hello world."), conversation("four")])
    examples = workspace.examples("{train: [{path: rows.jsonl}]}")
    for i in range(2):
        example = examples[i]
        assert isinstance(example, Example)
        ids, labels = np.asarray(example.input_ids), np.asarray(example.labels)
        assert ids.dtype == labels.dtype == np.int32
        assert ids.shape == labels.shape == (examples.lengths[i],)
        trained = labels != -100
        assert trained.any()
        assert not trained.all()
        np.testing.assert_array_equal(labels[trained], ids[trained])
    assert workspace.words(examples) == ["Hello world.<|im_end|>", "four<|im_end|>"]


def test_longer_rows_are_dropped_and_counted(workspace, said):
    workspace.write("rows.jsonl", [conversation("a"), conversation("long " * 40), conversation("b")])
    examples = workspace.examples("{train: [{path: rows.jsonl}], max_length: 30}")
    assert workspace.words(examples) == ["a<|im_end|>", "b<|im_end|>"]
    assert [examples.describe(i) for i in range(2)] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert "1 rows dropped: longer than data.max_length (30 tokens) (first: line 2)" in said()


def test_longer_rows_are_cut_and_counted(workspace, said):
    workspace.write("rows.jsonl", [conversation("a"), conversation("long " * 40)])
    whole = workspace.examples("{train: [{path: rows.jsonl}]}")
    cut = workspace.examples("{train: [{path: rows.jsonl}], max_length: 30, overlong: truncate}")
    assert cut.lengths.tolist() == [whole.lengths[0], 30]
    np.testing.assert_array_equal(cut[1].labels, whole[1].labels[:30])
    assert "1 rows cut to data.max_length (30 tokens) (first: line 2)" in said()


def test_the_summary_counts_rows_tokens_and_trained_tokens(workspace, said):
    workspace.write("rows.jsonl", [conversation("Hello."), conversation("", "x")])
    examples = workspace.examples("{train: [{path: rows.jsonl}]}")
    trained = sum(int((np.asarray(examples[i].labels) != -100).sum()) for i in range(2))
    tokens = int(examples.lengths.sum())
    assert f"train: 2 rows, {tokens} tokens, {trained} of them trained" in said()
    assert "rows.jsonl: 1 trained messages are empty (first: line 2)" in said()


def test_only_rank_0_reports_and_not_before_the_run_starts(workspace, said):
    from pegbox import hooks
    from pegbox.types import Processor

    workspace.write("rows.jsonl", [conversation("a")])
    processor = Processor(tokenizer=workspace.tokenizer, pad_id=0, fingerprint="")
    for rank in (1, 0):
        ctx = workspace.context("{train: [{path: rows.jsonl}]}")
        assert len(ctx.call(hooks.build_dataset, ctx, processor, "train")) == 1
        assert said() == ""
        workspace.start(ctx, rank)
    assert "train: 1 rows" in said()


def held_out(workspace, data, seed=0):
    ctx_rows = []
    for split in ("train", "eval"):
        examples = workspace.examples(data, split, seed=seed)
        ctx_rows.append([examples.describe(i) for i in range(len(examples))])
    return ctx_rows


@pytest.mark.parametrize(
    ("how", "count"), [("eval_rows: 7", 7), ("eval_fraction: 0.1", 4), ("eval_fraction: 0.001", 1)]
)
def test_held_out_rows_are_a_seeded_part_of_the_training_rows(workspace, how, count):
    workspace.write("rows.jsonl", [conversation(str(i)) for i in range(40)])
    data = f"{{train: [{{path: rows.jsonl}}], {how}}}"
    train, evaluation = held_out(workspace, data)
    assert len(evaluation) == count
    assert sorted([*train, *evaluation]) == sorted(f"rows.jsonl:{i + 1}" for i in range(40))
    assert held_out(workspace, data) == [train, evaluation]
    if count > 1:
        assert held_out(workspace, data, seed=1)[1] != evaluation


def test_the_length_rule_moves_no_row_between_the_splits(workspace):
    workspace.write("rows.jsonl", [conversation("x " * (40 - i)) for i in range(40)])
    train, evaluation = held_out(workspace, "{train: [{path: rows.jsonl}], eval_rows: 10}")
    short_train, short_eval = held_out(workspace, "{train: [{path: rows.jsonl}], eval_rows: 10, max_length: 40}")
    assert set(short_train) < set(train)
    assert set(short_eval) < set(evaluation)


def test_without_evaluation_data_there_is_no_split(workspace):
    workspace.write("rows.jsonl", [conversation("a")])
    assert workspace.examples("{train: [{path: rows.jsonl}]}", "eval") is None


def test_evaluation_files_are_a_split_of_their_own(workspace):
    workspace.write("train.jsonl", [conversation("a")])
    workspace.write("eval.jsonl", [conversation("b"), conversation("c")])
    data = "{train: [{path: train.jsonl}], eval: [{path: eval.jsonl}]}"
    assert workspace.words(workspace.examples(data, "eval")) == ["b<|im_end|>", "c<|im_end|>"]
    assert workspace.words(workspace.examples(data)) == ["a<|im_end|>"]


def test_kept_columns_stay_with_their_rows(workspace):
    rows = [
        {**conversation("a"), "answer": 4, "level": "easy"},
        {**conversation("b"), "answer": 5, "level": None},
    ]
    workspace.write("rows.jsonl", rows)
    examples = workspace.examples("{train: [{path: rows.jsonl}], columns: [answer, level]}")
    assert [examples[i].columns for i in range(2)] == [
        {"answer": 4, "level": "easy"},
        {"answer": 5, "level": None},
    ]


def test_plain_text_trains_the_completion_and_eos(workspace):
    workspace.write("rows.jsonl", [{"prompt": "2+2 is", "completion": " four"}])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion, options: {chat_template: false}}]}")
    assert workspace.words(examples) == [" four</s>"]
    assert workspace.tokenizer.decode(examples[0].input_ids) == "2+2 is four</s>"


def test_plain_text_needs_no_template_and_no_prompt(workspace, tokenizer_with):
    workspace.tokenizer = tokenizer_with(None)
    workspace.write("rows.jsonl", [{"text": "Hello world."}])
    examples = workspace.examples(
        '{train: [{path: rows.jsonl, format: completion, fields: {prompt: "", completion: text}, '
        "options: {chat_template: false}}]}"
    )
    assert workspace.words(examples) == ["Hello world.</s>"]


def test_plain_text_begins_with_the_bos_that_the_tokenizer_adds(workspace):
    from tokenizers.processors import TemplateProcessing

    tokenizer = workspace.tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    workspace.write("rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "<s>a", "completion": "b"}])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion, options: {chat_template: false}}]}")
    for i in range(2):
        assert tokenizer.decode(examples[i].input_ids) == "<s>ab</s>"
    assert workspace.words(examples) == ["b</s>", "b</s>"]


SETTINGS = {
    "another row": ("rows.jsonl", "{train: [{path: rows.jsonl}]}", [conversation("c")]),
    "a format's option": ("rows.jsonl", "{train: [{path: rows.jsonl, options: {turns: last}}]}", None),
    "limit": ("rows.jsonl", "{train: [{path: rows.jsonl, limit: 1}]}", None),
    "max_length": ("rows.jsonl", "{train: [{path: rows.jsonl}], max_length: 500}", None),
    "held-out rows": ("rows.jsonl", "{train: [{path: rows.jsonl}], eval_rows: 1}", None),
    "a field": ("rows.jsonl", "{train: [{path: rows.jsonl, fields: {tools: functions}}]}", None),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_the_fingerprint_changes_with(change, workspace):
    workspace.write("rows.jsonl", [conversation("a"), conversation("b")])
    before = workspace.examples("{train: [{path: rows.jsonl}]}").fingerprint
    name, data, rows = SETTINGS[change]
    if rows is not None:
        workspace.write(name, rows)
    assert workspace.examples(data).fingerprint != before


def test_the_fingerprint_changes_with_the_template(workspace, tokenizer_of):
    workspace.write("rows.jsonl", [conversation("a")])
    before = workspace.examples("{train: [{path: rows.jsonl}]}").fingerprint
    workspace.tokenizer = tokenizer_of("llama3")
    assert workspace.examples("{train: [{path: rows.jsonl}]}").fingerprint != before


def test_the_fingerprint_does_not_depend_on_where_the_file_lies(workspace):
    rows = [conversation("a"), conversation("b")]
    workspace.write("rows.jsonl", rows)
    workspace.write("moved.jsonl", rows)
    first, second = (
        workspace.examples(f"{{train: [{{path: {name}}}]}}").fingerprint for name in ("rows.jsonl", "moved.jsonl")
    )
    assert first == second
