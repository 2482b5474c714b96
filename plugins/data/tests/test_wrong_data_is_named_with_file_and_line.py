"""Every wrong file or setting gives one error that names the file and line, says why, and what to do next."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass, field

import pytest
from pegbox.errors import ConfigError, DataError, UserError


def chat(*turns: tuple[str, object], **extra: object) -> str:
    """One line of JSON."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages, **extra})


GOOD = chat(("user", "a"), ("assistant", "b"))
PAIR = json.dumps({"prompt": "a", "completion": "b"})
COMPLETION = "{train: [{path: rows.jsonl, format: completion}]}"
PLAIN = "{train: [{path: rows.jsonl, format: completion, options: {chat_template: false}}]}"


@dataclass(frozen=True)
class Wrong:
    """A data file (or a setting) and what the error must say."""

    content: str | bytes | None
    what: str
    next: str = ""
    name: str = "rows.jsonl"
    data: str = ""
    why: str = ""
    template: str | None = field(default="chatml")
    error: type[UserError] = DataError


CASES = {
    "invalid JSON": Wrong(
        f"{GOOD}\n{{bad\n", r"^rows\.jsonl:2: no valid JSON at column 2$", "Correct the row or remove it"
    ),
    "a row cut off": Wrong(f"{GOOD}\n{GOOD[:-5]}\n", r"^rows\.jsonl:2: no valid JSON at column \d+$"),
    "an array in a file of lines": Wrong(
        f"[\n{GOOD},\n{GOOD}\n]", r"^rows\.jsonl:1: no valid JSON at column 1 \(the first of 3", "source: json"
    ),
    "an array on one line": Wrong(f"[{GOOD}, {GOOD}]", r"^rows\.jsonl:1: the row is \[\{", "source: json"),
    "a compressed file whose name hides it": Wrong(
        gzip.compress(GOOD.encode()), r"^rows\.jsonl:1: the file is compressed", r"Rename it, as in name\.jsonl\.gz"
    ),
    "a plain file that is called compressed": Wrong(
        GOOD,
        r"^rows\.jsonl\.gz cannot be uncompressed$",
        "rename it, if it is not compressed",
        name="rows.jsonl.gz",
        data="{train: [{path: rows.jsonl.gz}]}",
        why="Not a gzipped file",
    ),
    "a compressed file that was cut": Wrong(
        gzip.compress(GOOD.encode())[:-9],
        r"^rows\.jsonl\.gz cannot be uncompressed$",
        "Write the file again",
        name="rows.jsonl.gz",
        data="{train: [{path: rows.jsonl.gz}]}",
        why="ended before the end-of-stream marker",
    ),
    "a row that is a list": Wrong(f"{GOOD}\n\n[1, 2]\n", r"^rows\.jsonl:3: the row is \[1, 2\]"),
    "bytes that are no UTF-8": Wrong(
        GOOD.encode() + b'\n{"messages": "\xff"}\n', r"^rows\.jsonl:2: no valid UTF-8: byte 0xff"
    ),
    "an empty file": Wrong("", r"^rows\.jsonl holds no rows", "Check the path"),
    "only blank lines": Wrong("\n \n\n", r"^rows\.jsonl holds no rows"),
    "a missing file": Wrong(
        None,
        r"^missing\.jsonl does not exist \(.*config\.yaml:5\)",
        r"data\.train\.0\.path",
        data="{train: [{path: missing.jsonl}]}",
        why="holds: ",
    ),
    "a misspelt file": Wrong(
        GOOD,
        r"^row\.jsonl does not exist",
        data="{train: [{path: row.jsonl}]}",
        why="Did you mean 'rows.jsonl'",
    ),
    "a missing folder": Wrong(
        None,
        r"^no/rows\.jsonl does not exist",
        data="{train: [{path: no/rows.jsonl}]}",
        why="There is no folder",
    ),
    "a folder without data": Wrong(
        GOOD,
        "is a folder without data files",
        name="rows.xlsx",
        data="{train: [{path: .}]}",
        why="holds: config.yaml, rows.xlsx",
    ),
    "an unknown suffix": Wrong(
        GOOD,
        r"^rows\.xlsx: no source reads files that end in '\.xlsx' \(.*config\.yaml:5\)",
        "jsonl",
        name="rows.xlsx",
        data="{train: [{path: rows.xlsx}]}",
        why=r"\.parquet",
    ),
    "a missing field": Wrong(
        f'{GOOD}\n{{"conversation": [], "id": 1}}\n',
        r"^rows\.jsonl:2: no field 'messages'",
        r"fields: \{messages: \.\.\.\}",
        why="conversation, id",
    ),
    "a misspelt field": Wrong('{"mesages": []}\n', r"^rows\.jsonl:1: no field 'messages'", why="The row has: mesages"),
    "no messages": Wrong(f'{GOOD}\n{{"messages": []}}\n', r"^rows\.jsonl:2: 'messages' is empty"),
    "messages that are a mapping": Wrong(
        '{"messages": {"role": "user"}}\n', r'^rows\.jsonl:1: \'messages\' is \{"role"'
    ),
    "messages that are text": Wrong('{"messages": "Hello"}\n', r"^rows\.jsonl:1: 'messages' is a string but no JSON"),
    "messages that are null": Wrong('{"messages": null}\n', r"^rows\.jsonl:1: 'messages' is null"),
    "a message that is text": Wrong('{"messages": ["Hello"]}\n', r'^rows\.jsonl:1: message 1 is "Hello"'),
    "an unknown role": Wrong(
        f"{GOOD}\n{chat(('user', 'a'), ('asistant', 'b'))}\n",
        r'^rows\.jsonl:2: message 2 has the unknown role "asistant"',
        r"options: \{roles: ",
        why="Did you mean 'assistant'",
    ),
    "a role that is no text": Wrong(f"{chat((3, 'a'))}\n", r"^rows\.jsonl:1: message 1 has the unknown role 3"),  # type: ignore[arg-type]
    "no role": Wrong('{"messages": [{"content": "a"}]}\n', r"^rows\.jsonl:1: message 1 has no 'role'", "fields: "),
    "no content": Wrong(
        '{"messages": [{"role": "user", "value": "a"}]}\n',
        r"^rows\.jsonl:1: message 1 has no 'content'",
        why="role, value",
    ),
    "a content that is null": Wrong(
        f"{chat(('user', None), ('assistant', 'b'))}\n",
        r"^rows\.jsonl:1: message 1 \(user\) has the content null",
    ),
    "a content with an image": Wrong(
        f"{chat(('user', [{'type': 'image', 'url': 'a.png'}]), ('assistant', 'b'))}\n",
        r"^rows\.jsonl:1: message 1 has the part \{.*image",
        "type: text",
    ),
    "a content that is a number": Wrong(
        f"{chat(('user', 'a'), ('assistant', 4))}\n",
        r"^rows\.jsonl:1: message 2 \(assistant\) has the content 4",
    ),
    "no answer": Wrong(
        f"{GOOD}\n{chat(('system', 'a'), ('user', 'b'))}\n",
        r"^rows\.jsonl:2: no message of this row is trained; its roles are: system, user \(no-trained-token\)",
        r"Remove the rows.*data\.allow: \[no-trained-token\]",
        why="switched off by flags",
    ),
    "every answer untrained": Wrong(
        '{"messages": [{"role": "assistant", "content": "b", "weight": 0}]}\n',
        r"^rows\.jsonl:1: no message of this row is trained",
    ),
    "a weight between": Wrong(
        '{"messages": [{"role": "assistant", "content": "b", "weight": 0.5}]}\n',
        r"^rows\.jsonl:1: message 1 has weight: 0\.5",
    ),
    "a flag that is text": Wrong(
        '{"messages": [{"role": "assistant", "content": "b", "train": "no"}]}\n',
        r'^rows\.jsonl:1: message 1 has train: "no"',
    ),
    "flags that disagree": Wrong(
        '{"messages": [{"role": "assistant", "content": "b", "train": true, "weight": 0}]}\n',
        r"^rows\.jsonl:1: message 1 has train: true and weight: 0",
    ),
    "a question that asks to be trained": Wrong(
        '{"messages": [{"role": "user", "content": "a", "train": true}]}\n',
        r"^rows\.jsonl:1: message 1 \(user\) asks to be trained",
        "train_roles",
    ),
    "tools that are no JSON": Wrong(
        f"{chat(('user', 'a'), ('assistant', 'b'), tools='add')}\n",
        r"^rows\.jsonl:1: 'tools' is a string but no JSON",
    ),
    "roles the template refuses": Wrong(
        f"{GOOD}\n{chat(('user', 'a'), ('user', 'b'), ('assistant', 'c'))}\n",
        r"^rows\.jsonl:2: the chat template of .* refuses the row: Conversation roles must alternate",
        why="user, user, assistant",
        template="gemma",
    ),
    "a template that rewrites calls": Wrong(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "reasoning_content": "hm", '
        '"tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}, {"role": "tool", "content": "2"}, '
        '{"role": "assistant", "content": "d"}]}',
        r"^rows\.jsonl:1: the chat template of .* renders message 2 differently in the conversation",
        "Add templates to plugins.*turns: last",
        template="gptoss",
    ),
    "a tokenizer without template": Wrong(
        GOOD,
        "has no chat template",
        "hf.chat_template.*instruct model.*chat_template: false",
        template=None,
    ),
    "a completion without its field": Wrong(
        f'{PAIR}\n{{"prompt": "a", "answer": "b"}}\n',
        r"^rows\.jsonl:2: no field 'completion'",
        "fields: ",
        data=COMPLETION,
        why="prompt, answer",
    ),
    "a completion that is a number": Wrong(
        '{"prompt": "a", "completion": 4}\n', r"^rows\.jsonl:1: 'completion' is 4", data=COMPLETION
    ),
    "a prompt that is null": Wrong(
        '{"prompt": null, "completion": "a"}\n', r"^rows\.jsonl:1: 'prompt' is null", data=PLAIN
    ),
    "a row longer than allowed": Wrong(
        f"{GOOD}\n{chat(('user', 'a'), ('assistant', 'b ' * 40))}\n",
        r"^rows\.jsonl:2: the row has \d+ tokens, data\.max_length is 20",
        "drop, truncate or split",
        data="{train: [{path: rows.jsonl}], max_length: 20, overlong: error}",
    ),
    "an answer cut away": Wrong(
        f"{GOOD}\n{chat(('user', 'a ' * 40), ('assistant', 'b'))}\n",
        r"^rows\.jsonl:2: cut to data\.max_length \(20 of \d+ tokens\), no token of this row is trained",
        "overlong: drop",
        data="{train: [{path: rows.jsonl}], max_length: 20, overlong: truncate}",
    ),
    "no row short enough": Wrong(
        GOOD,
        "no row is left in the split 'train', of 1 that were read",
        "Set data.max_length higher, or data.overlong: truncate",
        data="{train: [{path: rows.jsonl}], max_length: 2}",
        why=r"^rows\.jsonl: 1 rows dropped: longer than data\.max_length \(2 tokens\)",
    ),
    "no room behind any prompt": Wrong(
        json.dumps({"prompt": "a" * 30, "chosen": "b", "rejected": "c"}),
        "no row is left in the split 'train'",
        r"^Set data\.max_length higher\.$",
        data="{train: [{path: rows.jsonl, format: preference}], max_length: 20, overlong: truncate}",
        why="their prompt leaves no room for an answer",
    ),
    "no pair of different answers": Wrong(
        json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}),
        "no row is left in the split 'train'",
        "`fields` of their entries",
        data="{train: [{path: rows.jsonl, format: preference}]}",
        why=r"^rows\.jsonl: 1 rows whose two answers are the same: dropped \(first: line 1\)$",
    ),
    "a kept column that is missing": Wrong(
        f"{GOOD}\n",
        r"^rows\.jsonl:1: no column 'answer', which data\.columns keeps",
        data="{train: [{path: rows.jsonl}], columns: [answer]}",
    ),
    "a JSON file that is no array": Wrong(
        '{"data": []}',
        r"^rows\.json: the file holds no array",
        "source: jsonl",
        name="rows.json",
        data="{train: [{path: rows.json}]}",
    ),
    "an array with a broken row": Wrong(
        f"[\n{GOOD},\n{{bad}}\n]",
        r"^rows\.json:3: no valid JSON at column 2",
        name="rows.json",
        data="{train: [{path: rows.json}]}",
    ),
    "an array without a comma": Wrong(
        f"[\n{GOOD}\n{GOOD}\n]",
        r"^rows\.json:3: no ',' or '\]' after the row",
        name="rows.json",
        data="{train: [{path: rows.json}]}",
    ),
    "a CSV row with too many values": Wrong(
        "prompt,completion\na,b\na,b,c\n",
        r"^rows\.csv:3: 3 values for 2 columns",
        "quotes",
        name="rows.csv",
        data="{train: [{path: rows.csv, format: completion}]}",
    ),
    "a CSV column that is missing": Wrong(
        "question,answer\na,b\n",
        r"^rows\.csv:2: no field 'prompt'",
        "fields: ",
        name="rows.csv",
        data="{train: [{path: rows.csv, format: completion}]}",
        why="question, answer",
    ),
    "a CSV column twice": Wrong(
        "prompt,prompt\na,b\n",
        r"^rows\.csv: a column name stands twice",
        name="rows.csv",
        data="{train: [{path: rows.csv, format: completion}]}",
    ),
    "a CSV quote left open": Wrong(
        'prompt,completion\na,b\na,"b\n',
        r"^rows\.csv:3: no valid CSV",
        name="rows.csv",
        data="{train: [{path: rows.csv, format: completion}]}",
    ),
    "a CSV with a header only": Wrong(
        "prompt,completion\n",
        r"^rows\.csv holds no rows",
        name="rows.csv",
        data="{train: [{path: rows.csv, format: completion}]}",
    ),
    "a Parquet file that is none": Wrong(
        GOOD, r"^rows\.parquet: no valid Parquet", name="rows.parquet", data="{train: [{path: rows.parquet}]}"
    ),
    "an unknown format": Wrong(
        GOOD,
        r"there is no format 'chatt' \(.*config\.yaml:5\)",
        data="{train: [{path: rows.jsonl, format: chatt}]}",
        why="Did you mean 'chat'",
        error=ConfigError,
    ),
    "an unknown source": Wrong(
        GOOD,
        r"there is no source 'excel' \(.*config\.yaml:5\)",
        data="{train: [{path: rows.jsonl, source: excel}]}",
        why="arrow, csv, hub, json, jsonl, parquet, synthetic, text",
        error=ConfigError,
    ),
    "an unknown field of the format": Wrong(
        GOOD,
        r"format 'chat' has no field 'message' \(.*config\.yaml:5\)",
        data="{train: [{path: rows.jsonl, fields: {message: turns}}]}",
        why="Did you mean 'messages'",
        error=ConfigError,
    ),
    "an unknown option of the format": Wrong(
        GOOD,
        r"unknown key 'turn'(.|\n)*config\.yaml:5",
        data="{train: [{path: rows.jsonl, options: {turn: last}}]}",
        error=ConfigError,
    ),
    "an option of the wrong type": Wrong(
        GOOD,
        r"^data\.train\.0: options\.turns of the format 'chat' is 3",
        data="{train: [{path: rows.jsonl, options: {turns: 3}}]}",
        error=ConfigError,
    ),
    "no training data": Wrong(GOOD, "train", data="{train: []}", error=ConfigError),
    "a path that is a number": Wrong(GOOD, r"data\.train\.0\.path", data="{train: [{path: 3}]}", error=ConfigError),
    "two ways to evaluate": Wrong(
        GOOD,
        "eval_fraction and eval_rows are both set",
        data="{train: [{path: rows.jsonl}], eval_fraction: 0.1, eval_rows: 5}",
        error=ConfigError,
    ),
    "more held-out rows than rows": Wrong(
        GOOD,
        r"data\.eval_rows holds out 5 rows, but the training files have 1",
        data="{train: [{path: rows.jsonl}], eval_rows: 5}",
        error=ConfigError,
    ),
    "a fraction of two": Wrong(
        GOOD, "eval_fraction", data="{train: [{path: rows.jsonl}], eval_fraction: 2.0}", error=ConfigError
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_error(case, workspace, tokenizer_with, tokenizer_of):
    wrong = CASES[case]
    if wrong.content is not None:
        workspace.write(wrong.name, wrong.content)
    if wrong.template != "chatml":
        workspace.tokenizer = tokenizer_with(None) if wrong.template is None else tokenizer_of(wrong.template)
    with pytest.raises(wrong.error) as raised:
        workspace.examples(wrong.data or "{train: [{path: rows.jsonl}]}")
    error = raised.value
    assert error.exit_code == 2
    assert re.search(wrong.what, error.what), error.what
    assert re.search(wrong.why, error.why), error.why
    assert re.search(wrong.next, error.next), error.next
    assert "Traceback" not in str(error)
    if isinstance(error, DataError):
        assert error.why, "why is empty"
        assert error.next, "next is empty"


def test_the_first_of_many_bad_rows_is_named_and_all_are_counted(workspace):
    rows = [GOOD if i % 3 else '{"messages": []}' for i in range(1, 1601)]
    workspace.write("rows.jsonl", "\n".join(rows))
    with pytest.raises(
        DataError, match=r"^rows\.jsonl:3: 'messages' is empty \(the first of 533 bad rows among 1,600\)"
    ):
        workspace.examples("{train: [{path: rows.jsonl}]}")


def test_a_wrong_evaluation_file_is_found_before_the_training_rows_are_read(workspace):
    workspace.write("rows.jsonl", "{bad")
    with pytest.raises(DataError, match=r"^eval\.jsonl does not exist"):
        workspace.examples("{train: [{path: rows.jsonl}], eval: [{path: eval.jsonl}]}")


def test_pyarrow_is_needed_for_parquet_alone(workspace, monkeypatch):
    import sys

    workspace.write("rows.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError) as raised:
        workspace.examples("{train: [{path: rows.parquet}]}")
    assert "pip install 'pegbox-data[parquet]'" in raised.value.next
