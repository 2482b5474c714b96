"""Formats beside `chat`: instructions, segments, plain text, tokens, steps."""

from __future__ import annotations

import numpy as np
import pytest
from pegbox.errors import ConfigError, DataError

ALPACA = {"instruction": "Say it.", "input": "", "output": "four"}


def texts(workspace, examples):
    return [workspace.tokenizer.decode(list(examples[i].input_ids)) for i in range(len(examples))]


def test_alpaca_is_the_prompt_it_was_trained_with(workspace):
    """Expected texts are written out as in Stanford Alpaca's repository."""
    workspace.write("rows.jsonl", [ALPACA, {**ALPACA, "input": "two", "instruction": "Add {input}."}])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: alpaca}]}")
    assert workspace.words(examples) == ["four</s>", "four</s>"]
    plain, with_input = texts(workspace, examples)
    assert plain == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSay it.\n\n### Response:\nfour</s>"
    )
    assert with_input == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}.\n\n### Input:\ntwo\n\n### Response:\nfour</s>"
    )


@pytest.mark.parametrize(
    ("options", "row", "text"),
    [
        ("{prompt_no_input: 'Q: {instruction} A:'}", ALPACA, "Q: Say it. A:four</s>"),
        ("{prompt: '{input}|{instruction}|'}", {**ALPACA, "input": "two"}, "two|Say it.|four</s>"),
        ("{prompt_no_input: '{system}: {instruction}:', system: S}", ALPACA, "S: Say it.:four</s>"),
        ("{prompt_no_input: '{system}: {instruction}:', system: S}", {**ALPACA, "system": "R"}, "R: Say it.:four</s>"),
        (
            "{chat_template: true, system: S}",
            {**ALPACA, "input": "two"},
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nSay it.\n\ntwo<|im_end|>\n"
            "<|im_start|>assistant\nfour<|im_end|>\n",
        ),
    ],
)
def test_prompts_are_those_of_the_config(options, row, text, workspace):
    workspace.write("rows.jsonl", [row])
    examples = workspace.examples(f"{{train: [{{path: rows.jsonl, format: alpaca, options: {options}}}]}}")
    assert texts(workspace, examples) == [text]
    assert workspace.words(examples)[0].startswith("four<")


def test_a_prompt_with_an_unknown_blank_is_an_error(workspace):
    workspace.write("rows.jsonl", [ALPACA])
    with pytest.raises(ConfigError, match=r"\{question\}"):
        workspace.examples("{train: [{path: rows.jsonl, format: alpaca, options: {prompt: '{question}'}}]}")


def test_segments_are_trained_by_their_labels(workspace):
    segments = [("<s>one", False), (" two", True), (" three", True), (" four", False), (" new</s>", True)]
    row = {"segments": [{"text": text, "label": label} for text, label in segments]}
    workspace.write("rows.jsonl", [row])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: input_output}]}")
    assert texts(workspace, examples) == ["<s>one two three four new</s>"]
    assert workspace.words(examples) == [" two three new</s>"]


def test_documents_are_trained_whole_and_end_with_eos(workspace):
    workspace.write("rows.jsonl", [{"text": "one two"}, {"text": "three"}])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: pretraining}]}")
    assert workspace.words(examples) == ["one two</s>", "three</s>"]


def test_long_documents_become_several_rows_without_losing_a_token(workspace):
    text = "one two three four so less more " * 12
    workspace.write("rows.jsonl", [{"text": text}, {"text": "four"}])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: pretraining}], max_length: 20}")
    assert max(examples.lengths) == 20
    assert "".join(workspace.words(examples)) == f"{text}</s>four</s>"


def test_tokens_are_taken_as_they_are(workspace):
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6]},
        {"input_ids": [5, 6, 7, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "labels": [-100, -100, 7, -100, -100]},
    ]
    workspace.write("rows.jsonl", rows)
    examples = workspace.examples("{train: [{path: rows.jsonl, format: tokens}]}")
    made = [(list(examples[i].input_ids), list(examples[i].labels)) for i in range(3)]
    assert made == [([5, 6, 7], [-100, 6, 7]), ([5, 6], [5, 6]), ([5, 6, 7], [-100, -100, 7])]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"input_ids": [5, 99999]}, "holds the id 99999"),
        ({"input_ids": [5, 6], "labels": [5]}, "has 1 values for 2 tokens"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "holds 6 at position 0, where the token is 5"),
        ({"input_ids": "5 6"}, "no JSON"),
    ],
)
def test_tokens_that_do_not_fit_are_errors(row, what, workspace):
    workspace.write("rows.jsonl", [row])
    with pytest.raises(DataError, match=what):
        workspace.examples("{train: [{path: rows.jsonl, format: tokens}]}")


def test_steps_are_judged_at_the_separators_behind_them(workspace):
    """Against TRL's PRM trainer: the same tokens, and labels at the same places."""
    row = {"prompt": "What is it?", "completions": ["one two", "it is four."], "labels": [True, False]}
    workspace.write("rows.jsonl", [row])
    data = "{train: [{path: rows.jsonl, format: steps}], columns: [labels]}"
    example = workspace.examples(data)[0]
    tokenizer = workspace.tokenizer
    separator = tokenizer("\n")["input_ids"]
    steps = [tokenizer(step, add_special_tokens=False)["input_ids"] + separator for step in row["completions"]]
    prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
    assert list(example.input_ids) == [*prompt, *steps[0], *steps[1]]
    places = np.flatnonzero(np.asarray(example.labels) != -100)
    assert places.tolist() == [len(prompt) + len(steps[0]) - 1, len(example.input_ids) - 1]
    assert list(example.columns["labels"]) == row["labels"]


def test_only_the_last_step_is_judged_when_asked(workspace):
    workspace.write("rows.jsonl", [{"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}])
    data = "{train: [{path: rows.jsonl, format: steps, options: {train_on_last_step_only: true}}]}"
    example = workspace.examples(data)[0]
    assert np.flatnonzero(np.asarray(example.labels) != -100).tolist() == [len(example.input_ids) - 1]


@pytest.mark.parametrize(("name", "here"), [("sharegpt", "chat with fields: "), ("stepwise_supervised", "steps")])
def test_names_of_other_trainers_are_explained(name, here, workspace):
    workspace.write("rows.jsonl", [ALPACA])
    with pytest.raises(ConfigError) as unknown:
        workspace.examples(f"{{train: [{{path: rows.jsonl, format: {name}}}]}}")
    assert f"there is no format '{name}'" in unknown.value.what
    assert f"Here it is {here}" in unknown.value.why
