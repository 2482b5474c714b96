"""Formats with answers: columns of well-known datasets, errors that name the remedy, labels, prompts."""

from __future__ import annotations

import json
import re

import pytest
from pegbox.errors import ConfigError, DataError

Q, A, B, S = "what is the answer?", "It is four.", "less more", "Be kind."
ASKED = "<|im_start|>user\nwhat is the answer?<|im_end|>\n<|im_start|>assistant\n"
WITH_SYSTEM = f"<|im_start|>system\nBe kind.<|im_end|>\n{ASKED}"
END = "<|im_end|>\n"


def said(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, contents, strict=False)]


@pytest.fixture
def made(workspace):
    """The examples of rows, and what each document is as text."""

    def examples(rows, form="preference", **entry):
        workspace.write("rows.jsonl", rows if isinstance(rows, list) else [rows])
        return workspace.examples({"train": [{"path": "rows.jsonl", "format": form, **entry}]})

    return examples


def texts(workspace, example) -> list[str]:
    ids, found = list(example.input_ids), []
    for length in example.documents:
        found.append(workspace.tokenizer.decode(ids[:length]))
        ids = ids[length:]
    return found


PAIR = [f"{ASKED}{A}{END}", f"{ASKED}{B}{END}"]
PAIR_WITH_SYSTEM = [f"{WITH_SYSTEM}{A}{END}", f"{WITH_SYSTEM}{B}{END}"]
RANKED = [{"answer": "lead", "rank": 2}, {"answer": B, "rank": 5.0}, {"answer": A, "rank": 1.0}]
LAYOUTS = {
    "argilla": [
        ({"instruction": Q, "chosen_response": A, "rejected_response": B}, PAIR),
        ({"question": Q, "chosen": A, "rejected": B, "system": S}, PAIR_WITH_SYSTEM),
        ({"input": Q, "chosen": A, "rejected": B}, PAIR),
    ],
    "argilla_chat": [({"chosen": said(Q, A), "rejected": said(Q, B), "prompt": "1234"}, PAIR)],
    "icr": [({"system": S, "input": Q, "chosen": A, "rejected": B}, PAIR_WITH_SYSTEM)],
    "intel": [({"system": "", "question": Q, "chosen": A, "rejected": B}, PAIR)],
    "prompt_pairs": [({"system": None, "prompt": Q, "chosen": A, "rejected": B}, PAIR)],
    "ultra": [({"prompt": Q, "chosen": said(Q, A), "rejected": said(Q, B), "system": S}, PAIR_WITH_SYSTEM)],
    "nectar": [
        ({"prompt": f"\n\nHuman: {Q}\n\nAssistant: ", "answers": RANKED}, PAIR),
        ({"prompt": Q, "answers": json.dumps(RANKED)}, PAIR),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_know_the_columns_of_their_datasets(layout, workspace, made):
    for row, expected in LAYOUTS[layout]:
        (example,) = list(made(row, options={"layout": layout}))
        assert texts(workspace, example) == expected
        assert example.signs == (1, -1)


def test_fields_of_an_entry_go_before_its_layout(workspace, made):
    (example,) = list(made({"q": Q, "chosen": A, "rejected": B}, fields={"prompt": "q"}, options={"layout": "intel"}))
    assert texts(workspace, example) == PAIR


LABELLED = {
    "argilla": {"instruction": Q, "completion": B, "label": False},
    "argilla_chat": {"completion": said(Q, B), "label": "False"},
    "intel": {"question": Q, "completion": B, "label": 0, "system": ""},
    "prompt_pairs": {"prompt": Q, "completion": B, "label": False},
    "ultra": {"prompt": Q, "completion": B, "label": "false"},
}


@pytest.mark.parametrize("layout", LABELLED)
def test_layouts_of_rows_with_a_label(layout, workspace, made):
    (example,) = list(made(LABELLED[layout], "unpaired", options={"layout": layout}))
    assert texts(workspace, example) == PAIR[1:]
    assert example.signs == (-1,)


SAME = [
    {"prompt": Q, "chosen": A, "rejected": B},
    {"prompt": said(Q), "chosen": [{"role": "assistant", "content": A}], "rejected": B and said(Q, B)[1]},
    {"prompt": said(Q), "chosen": said(Q, A), "rejected": said(Q, B)},
    {"prompt": Q, "chosen": said(Q, A)[1:], "rejected": said(Q, B)[1:]},
    {"prompt": f" {Q}\n", "chosen": said(Q, A), "rejected": said(Q, B)},
    {"chosen": json.dumps(said(Q, A)), "rejected": json.dumps(said(Q, B))},
    {"prompt": None, "chosen": said(Q, A), "rejected": said(Q, B)},
]


@pytest.mark.parametrize("row", SAME)
def test_all_ways_to_write_a_pair_are_the_same_row(row, workspace, made):
    (example,) = list(made(row))
    assert texts(workspace, example) == PAIR


def test_messages_may_have_the_names_of_other_layouts(workspace, made):
    def from_value(*contents):
        return [{"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in said(*contents)]

    names = {"prompt": "conversations", "role": "from", "content": "value"}
    roles = {"human": "user", "gpt": "assistant"}
    row = {"conversations": from_value(Q), "chosen": from_value(Q, A)[1], "rejected": from_value(Q, B)[1]}
    (example,) = list(made(row, fields=names, options={"roles": roles}))
    assert texts(workspace, example) == PAIR
    ranked = {"conversations": f"\n\nHuman: {Q}\n\nAssistant:", "answers": RANKED}
    (best,) = list(made(ranked, fields=names, options={"roles": roles, "layout": "nectar"}))
    assert texts(workspace, best) == PAIR


@pytest.mark.parametrize(("instruction", "further"), [("what is", "the answer?"), (Q, ""), (Q, None), ("", Q)], ids=str)
def test_a_query_follows_the_prompt_on_a_line_of_its_own(instruction, further, workspace, made):
    """As LLaMA-Factory joins the columns `prompt` and `query`: those that are empty are left out."""
    asked = "\n".join(part for part in (instruction, further) if part)
    names = {"prompt": "instruction", "query": "input"}
    row = {"instruction": instruction, "input": further}
    expected = [text.replace(Q, asked) for text in PAIR]
    (pair,) = list(made({**row, "chosen": A, "rejected": B}, fields=names))
    assert texts(workspace, pair) == expected
    (one,) = list(made({**row, "completion": A, "label": True}, "unpaired", fields=names))
    assert texts(workspace, one) == expected[:1]
    (alone,) = list(made(row, "prompts", fields=names))
    assert workspace.tokenizer.decode(alone.input_ids) == ASKED.replace(Q, asked)


def test_a_query_that_cannot_follow_the_prompt_is_an_error(made):
    fields = {"query": "input"}
    answers = {"chosen": A, "rejected": B}
    with pytest.raises(DataError, match="no field 'input'"):
        made({"prompt": Q, **answers}, fields=fields)
    with pytest.raises(DataError, match="both must be texts"):
        made({"prompt": said(Q), "input": "more", **answers}, fields=fields)
    with pytest.raises(DataError, match="both must be texts"):
        made({"prompt": json.dumps(said(Q)), "input": "more", **answers}, fields=fields)
    with pytest.raises(ConfigError, match="layout nectar has none"):
        made({"prompt": Q, "answers": RANKED, "input": "more"}, fields=fields, options={"layout": "nectar"})


def test_one_answer_that_goes_on_where_the_other_ends_keeps_its_turns(workspace, made):
    (example,) = list(made({"chosen": said(Q, A), "rejected": said(Q, A, "and?", B)}))
    chosen, rejected = texts(workspace, example)
    assert chosen == f"{ASKED}{A}{END}"
    assert rejected.startswith(f"{ASKED}{A}{END}<|im_start|>user\nand?")
    trained = workspace.words([example])[0]
    assert trained == f"{A}<|im_end|>{A}<|im_end|>{B}<|im_end|>"


def test_formats_of_ones_own_put_texts_together(workspace, made):
    options = {
        "chat_template": False,
        "prompt_format": "[{system}] {prompt}",
        "answer_format": " -> {answer}",
    }
    row = {"prompt": Q, "chosen": A, "rejected": "{prompt}", "system": "S"}
    (example,) = list(made(row, options=options))
    assert texts(workspace, example) == [f"[S] {Q} -> {A}</s>", f"[S] {Q} -> {{prompt}}</s>"]
    (templated,) = list(made(row, options={"prompt_format": "Q: {prompt}"}))
    assert texts(workspace, templated)[0].startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ: what")


def test_flags_leave_messages_of_an_answer_untrained(workspace, made):
    turns = [{"role": "assistant", "content": A, "train": False}, *said("and?", B)]
    (example,) = list(made({"prompt": Q, "chosen": turns, "rejected": said(Q, B)[1:]}))
    assert workspace.words([example]) == [f"{B}<|im_end|>{B}<|im_end|>"]


WRONG = {
    "no prompt for the template": ({"chosen": A, "rejected": B}, {}, r"two texts and no prompt.*chat_template: false"),
    "nothing in common": (
        {"chosen": A, "rejected": B},
        {"options": {"chat_template": False}},
        r"no common beginning.*fields: \{prompt: \.\.\.\}",
    ),
    "another question": (
        {"prompt": "Hello", "chosen": said(Q, A), "rejected": said(Q, B)},
        {},
        r'do not ask the prompt.*fields: \{prompt: ""\}',
    ),
    "different conversations": (
        {"chosen": said(Q, A), "rejected": said("Hi", B)},
        {},
        r"begin with different messages",
    ),
    "a text and messages": ({"prompt": Q, "chosen": A, "rejected": said(Q, B)}, {}, r"are a text and a list"),
    "no rejected": ({"prompt": Q, "chosen": A}, {}, r"no field 'rejected'.*fields: \{rejected: \.\.\.\}"),
    "a number": ({"prompt": Q, "chosen": 4, "rejected": B}, {}, r"'chosen' is 4"),
    "a named prompt is missing": (
        {"chosen": said(Q, A), "rejected": said(Q, B)},
        {"fields": {"prompt": "question"}},
        r"no field 'question'",
    ),
    "messages as plain text": (
        {"chosen": said(Q, A), "rejected": said(Q, B)},
        {"options": {"chat_template": False}},
        r"list of 1 messages.*Remove chat_template: false",
    ),
    "a system message as plain text": (
        {"prompt": Q, "chosen": A, "rejected": B, "system": S},
        {"options": {"chat_template": False}},
        r"'system'.*\{system\}",
    ),
    "a trained prompt": (
        {"prompt": [{"role": "user", "content": Q, "train": True}], "chosen": A, "rejected": B},
        {},
        r"a message of the prompt \(user\) asks to be trained",
    ),
    "equal ranks": (
        {"prompt": Q, "answers": [{"answer": A, "rank": 1}, {"answer": B, "rank": 1}]},
        {"options": {"layout": "nectar"}},
        r"two answers of different ranks",
    ),
    "no label": ({"prompt": Q, "completion": A}, {"format": "unpaired"}, r"no field 'label'"),
    "half a label": ({"prompt": Q, "completion": A, "label": 0.5}, {"format": "unpaired"}, r"'label' is 0\.5"),
    "a completion alone": ({"completion": A, "label": True}, {"format": "unpaired"}, r"no prompt"),
    "no question": ({"completion": said(Q), "label": True}, {"format": "unpaired"}, r"a question and an answer"),
    "an answered prompt": ({"prompt": said(Q, A)}, {"format": "prompts"}, r"ends with a message of the assistant"),
    "an empty prompt": ({"prompt": ""}, {"format": "prompts"}, r"is empty"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_cannot_be_told_are_refused_with_the_remedy(name, workspace):
    row, entry, what = WRONG[name]
    workspace.write("rows.jsonl", [row])
    with pytest.raises(DataError) as refused:
        workspace.examples({"train": [{"path": "rows.jsonl", "format": "preference", **entry}]})
    assert refused.value.what.startswith("rows.jsonl:1: ")
    assert re.search(what, " ".join(str(refused.value).split()))


WRONG_OPTIONS = {
    "an unknown blank": ("preference", {"prompt_format": "{question}"}, r"\{question\}"),
    "a lost text": ("preference", {"answer_format": "ok"}, r"leaves out \{answer\}"),
    "roles without a template": ("preference", {"chat_template": False, "roles": {"human": "user"}}, r"roles means"),
    "a layout without labels": ("unpaired", {"layout": "nectar"}, r"unpair: true"),
    "answers of prompts": ("prompts", {"answer_format": "{answer}"}, r"unknown key 'answer_format'"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_options_that_cannot_mean_anything_are_refused_when_the_config_is_read(name, workspace):
    form, options, what = WRONG_OPTIONS[name]
    with pytest.raises(ConfigError, match=what):
        workspace.context({"train": [{"path": "rows.jsonl", "format": form, "options": options}]})


@pytest.mark.parametrize(
    ("overlong", "form"),
    [
        *(("split", form) for form in ("preference", "unpaired", "prompts", "steps")),
        *(("truncate", form) for form in ("prompts", "steps")),
    ],
)
def test_cuts_that_make_no_sense_are_refused_when_the_config_is_read(overlong, form, workspace):
    data = {"train": [{"path": "rows.jsonl", "format": form}], "max_length": 9, "overlong": overlong}
    with pytest.raises(ConfigError, match=f"overlong is {overlong}, and an entry has the format {form}"):
        workspace.context(data)


def test_equal_answers_are_left_out_and_counted(workspace, made):
    rows = [{"prompt": Q, "chosen": A, "rejected": A}, {"prompt": Q, "chosen": A, "rejected": B}]
    examples = made(rows)
    assert [texts(workspace, examples[i]) for i in range(len(examples))] == [PAIR]
    ctx = workspace.context({"train": [{"path": "rows.jsonl", "format": "preference"}]})
    from pegbox_data.loading import Datasets

    datasets = Datasets(ctx, workspace.processor())
    datasets.split("train")
    assert "rows.jsonl: 1 rows whose two answers are the same: dropped (first: line 1)" in datasets.report


def test_prompts_keep_the_columns_that_rewards_need(workspace):
    rows = [{"prompt": Q, "answer": "4", "steps": [1, 2], "id": 7}]
    workspace.write("rows.jsonl", rows)
    data = {"train": [{"path": "rows.jsonl", "format": "prompts", "options": {"default_system": S}}]}
    (example,) = list(workspace.examples({**data, "columns": ["answer", "steps"]}))
    assert workspace.tokenizer.decode(example.input_ids) == WITH_SYSTEM
    assert dict(example.columns) == {"answer": "4", "steps": [1, 2]}
    with pytest.raises(DataError, match=r"no column 'solution', which data\.columns keeps"):
        workspace.examples({**data, "columns": ["solution"]})
    (plain,) = list(workspace.examples({"train": [{**data["train"][0], "options": {"chat_template": False}}]}))
    assert workspace.tokenizer.decode(plain.input_ids) == Q


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("chatml.intel", "options: {layout: intel}"),
        ("llama3.ultra", "options: {layout: ultra}"),
        ("llama3.default", "hf.chat_template: llama_3"),
        ("chat_template.default", "preference with fields: {prompt: messages}"),
        ("chat_template.argilla_chat", "preference: answers that hold"),
        ("zephyr.nectar", "options: {layout: nectar}"),
        ("bradley_terry.chat_template", "options: {layout: icr}"),
        ("passthrough.default", "options: {chat_template: false}"),
        ("user_defined.default", "prompt_format"),
        ("kto", "unpaired"),
        ("prompt_only", "prompts"),
    ],
)
def test_transforms_of_other_trainers_are_explained(name, here, workspace):
    workspace.write("rows.jsonl", [{"prompt": Q}])
    with pytest.raises(ConfigError) as unknown:
        workspace.examples({"train": [{"path": "rows.jsonl", "format": name}]})
    assert here in unknown.value.why


def test_verdicts_on_steps_always_stay_with_the_row(workspace):
    row = {"q": "What?", "completions": ["one two", "it is four."], "verdicts": "[true, false]"}
    workspace.write("rows.jsonl", [row])
    entry = {"path": "rows.jsonl", "format": "steps", "fields": {"prompt": "q", "labels": "verdicts"}}
    (example,) = list(workspace.examples({"train": [entry]}))
    assert dict(example.columns) == {"labels": [True, False]}
    (named,) = list(workspace.examples({"train": [entry], "columns": ["labels", "q"]}))
    assert dict(named.columns) == {"labels": [True, False], "q": "What?"}
    assert sum(label != -100 for label in example.labels) == 2
    (last,) = list(workspace.examples({"train": [{**entry, "options": {"train_on_last_step_only": True}}]}))
    assert dict(last.columns) == {"labels": [False]}
