"""The same rows from every kind of file, each with the line it came from."""

from __future__ import annotations

import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

PAIRS = [("What is 2+2?", "four"), ('Say: "hi", then go', "hi\nand gone"), ("日本", "ünïcödé 🙂")]
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def as_csv() -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


FILES = {
    "rows.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS), [1, 2, 3]),
    "blank-lines.ndjson": ("\ufeff\n" + "\n\n".join(json.dumps(row) for row in ROWS), [2, 4, 6]),
    "rows.json": (json.dumps(ROWS), [1, 1, 1]),
    "indented.json": (json.dumps(ROWS, indent=2), [2, 6, 10]),
    "rows.csv": (as_csv(), [2, 3, 5]),
    "rows.parquet": (as_parquet(), [1, 2, 3]),
    "UPPER.JSONL": ("".join(json.dumps(row) + "\r\n" for row in ROWS), [1, 2, 3]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_source_gives_the_same_rows_and_their_lines(name, workspace):
    content, lines = FILES[name]
    workspace.write(name, content)
    examples = workspace.examples(f"{{train: [{{path: {name}, format: completion}}]}}")
    assert workspace.words(examples) == [f"{completion}<|im_end|>" for _, completion in PAIRS]
    assert [examples.describe(i) for i in range(3)] == [f"{name}:{line}" for line in lines]


def test_a_named_source_reads_a_file_of_any_suffix(workspace):
    workspace.write("rows.txt", ROWS)
    examples = workspace.examples("{train: [{path: rows.txt, format: completion, source: jsonl}]}")
    assert len(examples) == 3


def test_messages_may_be_a_json_string(workspace):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    workspace.write("rows.csv", 'messages\n"' + json.dumps(messages).replace('"', '""') + '"\n')
    assert workspace.words(workspace.examples("{train: [{path: rows.csv}]}")) == ["b<|im_end|>"]


def test_nested_parquet_rows_are_conversations(workspace):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages}] * 3000), workspace.folder / "rows.parquet"
    )
    examples = workspace.examples("{train: [{path: rows.parquet}]}")
    assert len(examples) == 3000
    assert examples.describe(2999) == "rows.parquet:3000"
    assert workspace.words(examples)[-1] == "b<|im_end|>"


def test_fields_of_other_layouts_are_mapped(workspace):
    turn = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    workspace.write("sharegpt.jsonl", [{"conversations": turn, "id": 7}])
    examples = workspace.examples(
        "{train: [{path: sharegpt.jsonl, fields: {messages: conversations, role: from, content: value}, "
        "options: {roles: {human: user, gpt: assistant}}}]}"
    )
    assert workspace.words(examples) == ["b<|im_end|>"]


def test_limit_takes_the_first_rows(workspace):
    workspace.write("rows.jsonl", [*ROWS[:2], "never read"])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion, limit: 2}]}")
    assert len(examples) == 2


def test_files_follow_one_another_in_the_order_of_the_config(workspace):
    workspace.write("a.jsonl", ROWS[:1])
    workspace.write("b.jsonl", ROWS[1:])
    examples = workspace.examples("{train: [{path: b.jsonl, format: completion}, {path: a.jsonl, format: completion}]}")
    assert [examples.describe(i) for i in range(3)] == ["b.jsonl:1", "b.jsonl:2", "a.jsonl:1"]


def test_paths_start_at_the_folder_of_the_config(workspace, tmp_path_factory, monkeypatch):
    workspace.write("rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion}]}")
    assert examples.describe(0) == f"{workspace.folder}/rows.jsonl:1"
