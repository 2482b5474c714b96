"""Findings stop a run unless they are allowed; each is shown with its cause and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from pegbox.errors import ConfigError, DataError
from pegbox_data.findings import FINDINGS, STOPS, table

GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "four"}]}
NO_END = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["one", "two", "three", "four"] * 4
PARTS = [{"type": "text", "text": f"{word} ", "train": number % 2 == 0} for number, word in enumerate(WORDS)]
SYSTEM = {"role": "system", "content": "Be a kind one."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CASES = {
    "no-trained-token": ({"messages": GOOD["messages"][:1]}, {}, None),
    "missing-end-of-turn": (GOOD, {}, NO_END),
    "doubled-bos": ({"messages": [{"role": "user", "content": "a"}, *GOOD["messages"][1:]], "x": 1}, {}, "<s><s>{}"),
    "pad-is-eos-untrained": ({"input_ids": [5, 6, 0, 0], "labels": [-100, 6, -100, -100]}, {"format": "tokens"}, None),
    "vanished-turn": ({"messages": [SYSTEM, *GOOD["messages"]]}, {}, NO_SYSTEM),
    "vanished-tools": ({**GOOD, "tools": [TOOL]}, {}, None),
    "span-inside-token": ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": PARTS}]}, {}, None),
    "unequal-prompts": (
        {
            "prompt": GOOD["messages"],
            "chosen": GOOD["messages"],
            "rejected": [{"role": "user", "content": "b"}, *GOOD["messages"][1:]],
        },
        {"format": "preference"},
        None,
    ),
    "truncated-away": (
        {"messages": [{"role": "user", "content": "one two " * 30}, *GOOD["messages"][1:]]},
        {"max_length": 20, "overlong": "truncate"},
        None,
    ),
}
CHATML_TWICE = (
    "<s><s>{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepared(workspace, tokenizer_with, name):
    row, settings, template = CASES[name]
    if template is not None:
        workspace.tokenizer = tokenizer_with(CHATML_TWICE if name == "doubled-bos" else template)
    if name == "pad-is-eos-untrained":
        workspace.tokenizer.eos_token = workspace.tokenizer.convert_ids_to_tokens(0)
    settings = dict(settings)
    entry = {"path": "rows.jsonl", "format": settings.pop("format", "chat")}
    good = {
        "chat": GOOD,
        "tokens": {"input_ids": [5, 6], "labels": [-100, 6]},
        "preference": {"prompt": "a", "chosen": "four", "rejected": "new"},
    }[entry["format"]]
    workspace.write("rows.jsonl", [good, row])
    return {"train": [entry], **settings}


def test_there_is_a_case_for_each():
    assert set(CASES) == {finding.id for finding in STOPS}


@pytest.mark.parametrize("name", CASES)
def test_it_stops_with_its_cause_and_what_to_do(name, workspace, tokenizer_with):
    data = prepared(workspace, tokenizer_with, name)
    with pytest.raises(DataError) as stopped:
        workspace.examples(data)
    assert f"({name})" in stopped.value.what
    assert stopped.value.why == FINDINGS[name].cause
    assert FINDINGS[name].fix in stopped.value.next
    assert f"data.allow: [{name}]" in stopped.value.next


@pytest.mark.parametrize("name", CASES)
def test_allowed_it_is_counted_and_printed(name, workspace, tokenizer_with):
    data = {**prepared(workspace, tokenizer_with, name), "allow": [name]}
    if name == "missing-end-of-turn":
        assert len(workspace.examples(data)) == 2
        return
    examples = workspace.examples(data)
    assert len(examples) == (1 if FINDINGS[name].drops else 2)


def test_only_findings_that_stop_can_be_allowed(workspace):
    workspace.write("rows.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=r"'no-traind-token'(.|\n)*'no-trained-token'"):
        workspace.examples({"train": [{"path": "rows.jsonl"}], "allow": ["no-traind-token"]})


def test_the_page_of_the_plugin_has_the_table():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert table() in readme


def test_the_end_of_an_answer_is_trained_where_it_is_the_padding_token_too(workspace):
    workspace.tokenizer.eos_token = workspace.tokenizer.pad_token = "<|im_end|>"
    workspace.write("rows.jsonl", [GOOD])
    assert workspace.words(workspace.examples({"train": [{"path": "rows.jsonl"}]})) == ["four<|im_end|>"]
