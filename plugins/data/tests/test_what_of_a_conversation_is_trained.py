"""Options and marks of the format `chat`: parts, ranges, ends of turns, roles, system messages, variables per row."""

from __future__ import annotations

import json

import pytest
from pegbox.errors import DataError

QUESTION = {"role": "user", "content": "a"}


def said(content, **extra):
    return {"role": "assistant", "content": content, **extra}


def part(text, **extra):
    return {"type": "text", "text": text, **extra}


TWO = [QUESTION, said("one"), {"role": "user", "content": "b"}, said("two")]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([part("one", train=False), part(" two")], " two<|im_end|>"),
        ([part("one"), part(" two", train=False)], "one<|im_end|>"),
        ([part("one", weight=0), part(" two", weight=1), part(" three", weight=0)], " two<|im_end|>"),
        ([part("one"), part(" two")], "one two<|im_end|>"),
        (
            ["one", {"type": "text", "content": " two", "train": False}, {"type": "text", "value": " three"}],
            "one three<|im_end|>",
        ),
        ([part("one", train=False)], "<|im_end|>"),
    ],
)
def test_parts_decide_for_themselves(parts, words, chatml, masked):
    assert masked(chatml, [QUESTION, said(parts)]).words == words


def test_a_token_over_the_border_of_two_parts_is_not_trained_and_is_counted(chatml, masked):
    result = masked(chatml, [QUESTION, said([part("one ", train=False), part("two three four so less more")])])
    assert result.words == " three four so less more<|im_end|>"
    assert [note.id for note in result.notes] == ["border-token"]


def test_many_such_tokens_are_a_finding_that_stops(chatml, masked):
    parts = [part(f"{word} ", train=number % 2 == 0) for number, word in enumerate(["one", "two", "three", "four"] * 3)]
    assert "span-inside-token" in [note.id for note in masked(chatml, [QUESTION, said(parts)]).notes]


def test_parts_of_the_reasoning_decide_for_themselves(tokenizer_of, masked):
    message = said("four", reasoning_content=[part("one", train=False), part(" two")])
    words = masked(tokenizer_of("qwen3"), [QUESTION, message]).words
    assert words == "<think>\n two\n</think>\n\nfour<|im_end|>"


def test_a_part_of_an_untrained_message_can_be_trained(chatml, masked):
    messages = [{"role": "user", "content": [part("one"), part(" two", train=True)]}, said("four")]
    assert masked(chatml, messages).words == " twofour<|im_end|>"


@pytest.mark.parametrize(
    ("detail", "words"),
    [
        ([{"begin": 3, "end": 7, "train": False}], "one three<|im_end|>"),
        ([{"begin_offset": 3, "end_offset": 6, "train": False}], "one three<|im_end|>"),
        ([{"begin": 0, "end": 3, "train": False}, {"begin": 7, "end": 13, "train": False}], " two<|im_end|>"),
        ([], "one two three<|im_end|>"),
    ],
)
def test_ranges_of_characters_decide_for_themselves(detail, words, chatml, masked):
    assert masked(chatml, [QUESTION, said("one two three", train_detail=detail)]).words == words


def test_ranges_find_their_place_where_the_template_trims_and_texts_repeat(tokenizer_of, masked):
    messages = [
        {"role": "user", "content": "one two"},
        said("  one two \n", train_detail=[{"begin": 5, "end": 9, "train": False}]),
    ]
    assert masked(tokenizer_of("gemma3"), messages).words == "one<end_of_turn>"


@pytest.mark.parametrize(
    ("detail", "what"),
    [
        ([{"begin": 0, "end": 99, "train": True}], "in train_detail"),
        ([{"begin": 2, "end": 2, "train": True}], "in train_detail"),
        ([{"begin": 0, "end": 2}], "in train_detail"),
        ([{"begin": 0, "end": 2, "train": True}, {"begin": 1, "end": 3, "train": False}], "overlapping ranges"),
        ("0-5", "has train_detail"),
    ],
)
def test_impossible_ranges_are_errors(detail, what, chatml, masked):
    with pytest.raises(DataError, match=what):
        masked(chatml, [QUESTION, said("one", train_detail=detail)])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("turn", "one<|im_end|>two<|im_end|>"),
        ("last", "onetwo<|im_end|>"),
        ("none", "onetwo"),
        ("all", "<|im_end|>one<|im_end|><|im_end|>two<|im_end|>"),
    ],
)
def test_ends_of_turns_are_trained_as_asked(rule, words, chatml, masked):
    result = masked(chatml, TWO, train_end_of_turn=rule)
    assert result.words == words
    assert result.notes == ()


@pytest.mark.parametrize(
    ("turn", "sequence", "words"),
    [
        ("turn", None, "one<|end|>two<|end|>\n</s>"),
        ("turn", "none", "one<|end|>two<|end|>"),
        ("none", "turn", "onetwo</s>"),
        ("none", None, "onetwo"),
        ("last", "none", "onetwo<|end|>"),
    ],
)
def test_an_end_of_sequence_that_stands_apart_has_a_rule_of_its_own(turn, sequence, words, tokenizer_of, masked):
    options = {"train_end_of_turn": turn, **({"train_end_of_sequence": sequence} if sequence else {})}
    assert masked(tokenizer_of("phi3"), TWO, **options).words == words


def test_closing_tags_of_calls_are_no_end_of_a_turn(tokenizer_of, masked):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    words = masked(tokenizer_of("qwen2_5"), [QUESTION, said("", tool_calls=[call])], train_end_of_turn="none").words
    assert words.endswith("</tool_call>")


def test_inputs_are_trained_when_asked(chatml, masked):
    assert masked(chatml, TWO, train_on_inputs=True).mask.all()


def test_without_roles_only_flags_count(chatml, masked):
    messages = [{**QUESTION, "train": True}, said("one"), said("two", train=True)]
    words = masked(chatml, messages, train_roles=[]).words
    assert words == "<|im_start|>user\na<|im_end|>two<|im_end|>"


def test_a_row_without_anything_to_train_is_found_out(chatml, masked):
    (note,) = masked(chatml, [QUESTION, said("one", train=False)]).notes
    assert note.id == "no-trained-token"
    assert "user, assistant" in note.detail


def test_system_messages_are_added_or_dropped(chatml, masked):
    system = {"role": "system", "content": "S"}
    assert masked(chatml, TWO, default_system="D").text.startswith("<|im_start|>system\nD<|im_end|>")
    assert masked(chatml, [system, *TWO], default_system="D").text.startswith("<|im_start|>system\nS<|im_end|>")
    assert masked(chatml, [system, *TWO], drop_system=True).text == masked(chatml, TWO).text
    assert masked(chatml, TWO, columns={"system": "S"}).text == masked(chatml, [system, *TWO]).text


def test_thinking_between_tags_becomes_reasoning_when_asked(tokenizer_of, masked):
    tokenizer = tokenizer_of("qwen3")
    tagged = [QUESTION, said("<think>\ncount\n</think>\n\nfour")]
    apart = [QUESTION, said("four", reasoning_content="count")]
    assert masked(tokenizer, tagged, split_thinking=True).text == masked(tokenizer, apart).text


def test_reasoning_reaches_templates_under_either_name(tokenizer_of, masked):
    messages = [QUESTION, said("four", reasoning_content="count")]
    assert "<|channel|>analysis<|message|>count<|end|>" in masked(tokenizer_of("gptoss"), messages).text
    assert "<think>\ncount\n</think>" in masked(tokenizer_of("qwen3"), messages).text


def test_hidden_reasoning_is_noticed_although_its_words_stand_elsewhere(tokenizer_of, masked):
    messages = [QUESTION, said("add them", reasoning_content="add"), {"role": "user", "content": "b"}, said("add")]
    notes = masked(tokenizer_of("qwen3"), messages).notes
    assert "hidden-reasoning" in [note.id for note in notes]


@pytest.mark.parametrize("as_text", [False, True])
def test_each_row_has_template_variables_of_its_own(as_text, tokenizer_of, masked):
    tokenizer = tokenizer_of("gptoss")
    kwargs = {"reasoning_effort": "high", "unset": None}
    row = masked(
        tokenizer,
        TWO,
        columns={"chat_template_kwargs": json.dumps(kwargs) if as_text else kwargs},
        template_kwargs={"reasoning_effort": "low"},
    )
    assert "Reasoning: high" in row.text
    assert "Reasoning: low" in masked(tokenizer, TWO, template_kwargs={"reasoning_effort": "low"}).text


def test_arguments_of_calls_are_the_same_as_text_and_as_object(tokenizer_of, masked):
    tokenizer = tokenizer_of("qwen2_5")

    def called(arguments):
        call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
        return masked(tokenizer, [QUESTION, {"role": "assistant", "content": None, "tool_calls": [call]}]).text

    assert called('{"a": 1}') == called({"a": 1})
    with pytest.raises(DataError, match="message 2 calls add with arguments that are no JSON"):
        called("{a: 1")


def test_a_call_that_the_template_does_not_render_is_found_out(chatml, masked):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    notes = masked(chatml, [QUESTION, said("one", tool_calls=[call])], tools=tools).notes
    assert [note.id for note in notes] == ["vanished-turn", "vanished-tools"]


def test_a_system_message_that_the_template_drops_is_found_out(tokenizer_with, masked):
    tokenizer = tokenizer_with(
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    notes = masked(tokenizer, [{"role": "system", "content": "Be a kind one."}, *TWO]).notes
    assert [note.id for note in notes] == ["vanished-turn"]
    assert "message 1 (system)" in notes[0].detail
    # That its text stands elsewhere does not hide that it is gone.
    notes = masked(tokenizer, [{"role": "system", "content": "two"}, *TWO]).notes
    assert [note.id for note in notes] == ["vanished-turn"]
