"""Token ids and completion masks are those of TRL's trainers, but where the difference is meant.

Meant differences, each with a test: whitespace behind the end of a turn is not trained; in answers with tool turns only
what the assistant says is; an implicit prompt of plain texts ends with a whole word; a token that reaches over the
border of a prompt is not trained.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


def said(role: str, content: str) -> dict[str, object]:
    return {"role": role, "content": content}


QUESTION = [said("user", "what is the answer?")]
CHOSEN, REJECTED = [said("assistant", "It is four.")], [said("assistant", "less")]
HISTORY = [said("user", "Hello"), said("assistant", "Hello world"), *QUESTION]
PAIRS = {
    "explicit": {"prompt": QUESTION, "chosen": CHOSEN, "rejected": REJECTED},
    "implicit": {"chosen": HISTORY + CHOSEN, "rejected": HISTORY + REJECTED},
    "history": {"prompt": HISTORY, "chosen": CHOSEN, "rejected": REJECTED},
    "unicode": {"prompt": [said("user", "日本?")], "chosen": [said("assistant", "ünï 🙂")], "rejected": REJECTED},
}
TEMPLATES = ("qwen2_5", "qwen3", "llama3", "gemma", "phi3", "cohere", "gptoss")


@pytest.fixture(scope="module", autouse=True)
def _trl():
    """Imported before the first test is timed."""
    import datasets
    import trl.trainer.dpo_trainer
    import trl.trainer.kto_trainer

    assert datasets
    assert trl


def of_trl(trainer: str, row, tokenizer) -> list[tuple[list[int], list[bool]]]:
    """Ids and completion mask of each sequence that a trainer of TRL makes of a row."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    prepare = {"dpo": DPOTrainer, "kto": KTOTrainer}[trainer]._prepare_dataset
    this = SimpleNamespace(_tokenizer=tokenizer, _is_vision_dataset=False, calculate_KL=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = prepare(this, Dataset.from_list([copy.deepcopy(row)]), tokenizer, args, "train")
    names = ("chosen_ids", "rejected_ids") if trainer == "dpo" else ("completion_ids",)
    return [
        (row["prompt_ids"] + row[name], [False] * len(row["prompt_ids"]) + [True] * len(row[name]))
        for row in rows
        for name in names
    ]


def documents(example) -> list[tuple[list[int], list[bool]]]:
    """Ids and mask of each document."""
    made, at = [], 0
    for length in example.documents:
        own = slice(at, at + length)
        made.append((list(example.input_ids[own]), [label != -100 for label in example.labels[own]]))
        at += length
    assert at == len(example.input_ids)
    return made


@pytest.fixture
def ours(workspace):
    def examples(row, **entry):
        workspace.write("rows.jsonl", [row])
        made = workspace.examples({"train": [{"path": "rows.jsonl", "format": "preference", **entry}]})
        return [made[index] for index in range(len(made))]

    return examples


def differing(tokenizer, own, theirs) -> list[str]:
    """The tokens on whose being trained two documents with the same ids disagree."""
    assert own[0] == theirs[0]
    return [tokenizer.decode([token]) for token, a, b in zip(own[0], own[1], theirs[1], strict=True) if a != b]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", PAIRS)
def test_conversations_have_the_ids_and_the_masks_of_dpo_but_for_whitespace_after_turns(
    template, name, workspace, tokenizer_of, ours
):
    workspace.tokenizer = tokenizer_of(template)
    (example,) = ours(PAIRS[name])
    assert example.signs == (1, -1)
    expected = of_trl("dpo", PAIRS[name], workspace.tokenizer)
    for own, theirs in zip(documents(example), expected, strict=True):
        assert not "".join(differing(workspace.tokenizer, own, theirs)).strip()
        assert any(own[1])


def test_tools_and_a_system_message_are_rendered_as_by_dpo(workspace, tokenizer_of, ours):
    workspace.tokenizer = tokenizer_of("qwen2_5")
    row = {**PAIRS["explicit"], "prompt": [said("system", "Be kind."), *QUESTION], "tools": [TOOL]}
    (example,) = ours(row)
    expected = of_trl("dpo", row, workspace.tokenizer)
    for own, theirs in zip(documents(example), expected, strict=True):
        assert differing(workspace.tokenizer, own, theirs) == ["\n"]
    (apart,) = ours({**row, "prompt": QUESTION, "system": "Be kind."})
    assert list(apart.input_ids) == list(example.input_ids)


def test_in_answers_with_tool_turns_only_what_the_assistant_says_is_trained(workspace, tokenizer_of, ours):
    workspace.tokenizer = tokenizer_of("qwen2_5")
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    turns = [call, said("tool", "two three"), said("assistant", "It is four.")]
    row = {"prompt": QUESTION, "chosen": turns, "rejected": REJECTED, "tools": [TOOL]}
    (example,) = ours(row)
    chosen, _ = documents(example)
    theirs, _ = of_trl("dpo", row, workspace.tokenizer)
    only_theirs = "".join(differing(workspace.tokenizer, chosen, theirs))
    assert "two three" in only_theirs
    assert "four" not in only_theirs
    trained = workspace.tokenizer.decode([token for token, one in zip(*chosen, strict=True) if one])
    assert trained.count("<|im_end|>") == 2
    assert '"name": "add"' in trained
    assert not any(one and not other for one, other in zip(chosen[1], theirs[1], strict=True))


TEXTS = {"prompt": "what is the answer?", "chosen": " It is four.", "rejected": " less"}
PLAIN = {"chat_template": False}


def test_plain_texts_have_the_ids_and_the_masks_of_dpo_with_eos(workspace, ours):
    (example,) = ours(TEXTS, options=PLAIN)
    expected = of_trl("dpo", TEXTS, workspace.tokenizer)
    assert documents(example) == expected
    assert all(ids[-1] == workspace.tokenizer.eos_token_id and mask[-1] for ids, mask in documents(example))
    (ended,) = ours({**TEXTS, "chosen": " It is four.</s>"}, options=PLAIN)
    assert list(ended.input_ids) == list(example.input_ids)


def test_an_implicit_prompt_of_plain_texts_ends_with_a_whole_word(workspace, ours):
    row = {"chosen": "The answer is less.", "rejected": "The answer is lead."}
    (example,) = ours(row, options=PLAIN)
    expected = of_trl("dpo", row, workspace.tokenizer)
    for own, theirs, word in zip(documents(example), expected, (" less.", " lead."), strict=True):
        assert own[0] == theirs[0]
        trained = workspace.tokenizer.decode([token for token, one in zip(*own, strict=True) if one])
        assert trained == f"{word}</s>"
        assert not any(b and not a for a, b in zip(own[1], theirs[1], strict=True))


def test_a_token_over_the_border_of_a_prompt_is_trained_by_trl_and_not_here(workspace, ours):
    row = {"prompt": "what is ", "chosen": "the answer, what is the answer, what is the answer?"}
    (token,) = workspace.tokenizer(" the", add_special_tokens=False)["input_ids"]
    row["rejected"] = "the world, what is the answer, what is it? the answer is four"
    (example,) = ours(row, options=PLAIN)
    theirs = of_trl("dpo", row, workspace.tokenizer)
    for own, other in zip(documents(example), theirs, strict=True):
        assert differing(workspace.tokenizer, own, other) == [" the"]
        assert not own[1][own[0].index(token)]


@pytest.mark.parametrize("name", ["explicit", "history"])
def test_unpaired_conversations_have_the_ids_and_the_masks_of_kto(name, workspace, tokenizer_of, ours):
    workspace.tokenizer = tokenizer_of("llama3")
    pair = PAIRS[name]
    row = {"prompt": pair["prompt"], "completion": pair["rejected"], "label": False}
    (example,) = ours(row, format="unpaired")
    assert example.signs == (-1,)
    assert documents(example) == of_trl("kto", row, workspace.tokenizer)


@pytest.mark.parametrize("name", PAIRS)
def test_unpaired_pairs_are_the_rows_that_kto_makes_of_them(name, workspace, tokenizer_of, ours):
    workspace.tokenizer = tokenizer_of("llama3")
    examples = ours(PAIRS[name], format="unpaired", options={"unpair": True})
    assert [example.signs for example in examples] == [(1,), (-1,)]
    assert [documents(example)[0] for example in examples] == of_trl("kto", PAIRS[name], workspace.tokenizer)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompts_are_what_trl_generates_from(template, workspace, tokenizer_of, ours):
    workspace.tokenizer = tokenizer_of(template)
    row = {"prompt": HISTORY}
    (example,) = ours(row, format="prompts")
    expected = workspace.tokenizer.apply_chat_template(HISTORY, add_generation_prompt=True, tokenize=True)
    assert list(example.input_ids) == list(expected["input_ids"])
    assert not np.any(np.asarray(example.labels) != -100)
    assert example.signs == ()
