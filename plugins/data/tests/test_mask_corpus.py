"""The corpus of masks: every template under every shape of conversation, against an independent reading of the text.

The reading scans the final text with each family's grammar of turns, as its model cards document it; it knows nothing
of messages, templates or the code under test.
"""

from __future__ import annotations

import copy
import json
import re
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pegbox.errors import DataError
from pegbox.plan import compose
from pegbox.types import Processor
from pegbox_data.twins import with_templates

CHATML = (r"<\|im_start\|>assistant\n", r"<\|im_end\|>")
QUIET = (r"<\|im_start\|>assistant\n(?:<think>\n\n</think>\n\n)?", r"<\|im_end\|>")
LLAMA = (r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>")
GEMMA = (r"<start_of_turn>model\n", r"<end_of_turn>")
PHI = (r"<\|assistant\|>\n", r"<\|end\|>(?:\n</s>$)?")
COMMAND = (r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>")
DEEPSEEK = (r"<｜Assistant｜>(?:<think>\n)?|<｜tool▁outputs▁end｜>(?!<｜Assistant｜>)", r"<｜end▁of▁sentence｜>")
MISTRAL = (r"\[/INST\]|\[/TOOL_RESULTS\](?!\[TOOL_RESULTS\])|(?:^<s>|(?<=</s>))(?!\[)", r"</s>")
HARMONY = (
    r"<\|start\|>assistant",
    r"(?:<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant)?.*?(?:<\|end\|>|<\|return\|>|<\|call\|>)",
)
FAMILIES = {
    "chatml": CHATML,
    "qwen-2.5": CHATML,
    "qwen-3": CHATML,
    "llama-3": LLAMA,
    "llama-3.1": LLAMA,
    "gemma": GEMMA,
    "gemma-3": GEMMA,
    "phi-3": PHI,
    "phi-3.5": PHI,
    "command-r": COMMAND,
    "deepseek-v3": DEEPSEEK,
    "mistral-v3": MISTRAL,
    "mistral-v3-tekken": MISTRAL,
    "mistral-v7": MISTRAL,
    "harmony": HARMONY,
    "alpaca": (r"### Response:\n", r"</s>"),
    "zephyr": (r"<\|assistant\|>\n", r"</s>"),
    "trl:qwen2_5": CHATML,
    "trl:qwen3": CHATML,
    "trl:qwen3_instruct_2507": CHATML,
    "trl:lfm2": CHATML,
    "trl:llama3": LLAMA,
    "trl:llama3_1": LLAMA,
    "trl:llama3_2": LLAMA,
    "trl:gemma": GEMMA,
    "trl:gemma3": GEMMA,
    "trl:phi3": PHI,
    "trl:phi3_5": PHI,
    "trl:cohere": COMMAND,
    "trl:gptoss": HARMONY,
}
"""Header and footer of an assistant's turn by template; `trl:` are templates as models publish them."""


def turns(family: str, text: str, quiet: bool = False) -> list[tuple[int, int]]:
    """The character ranges of the assistant's turns in a text, end-of-turn token included, in order.

    With `quiet` an empty thinking block after the header belongs to it: the generation prompt gives it.
    """
    header, footer = FAMILIES[family] if not quiet else QUIET
    found, at = [], 0
    for opening in re.finditer(header, text):
        if opening.start() < at:
            continue
        closing = re.compile(footer, re.DOTALL).search(text, opening.end())
        if closing is None:
            break
        at = closing.end()
        found.append((opening.end(), at))
    return found


CALL = {"id": "abcdefgh9", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def said(content: str | None, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **extra}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content, "tool_call_id": "abcdefgh9", "name": "add"}


class Shape(NamedTuple):
    """A conversation, and which of the assistant's turns are trained (None: all of them)."""

    messages: list[dict[str, Any]]
    trained: tuple[int, ...] | None = None
    tools: Any = None
    options: dict[str, Any] = {}  # noqa: RUF012


THREE = [user("a"), said("one"), user("b"), said("two"), user("c"), said("three")]
CALLED = [user("1+1?"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, result("2"), said("Two.")]
SHAPES = {
    "one turn": Shape([user("Hi"), said("Hello world.")]),
    "two turns": Shape([user("Hi"), said("Hello."), user("And?"), said("It is four.")]),
    "three turns": Shape(THREE),
    "system": Shape([system("Be kind."), user("Hi"), said("Hello.")]),
    "system, two turns": Shape([system("Be kind."), user("a"), said("b"), user("c"), said("d")]),
    "system in the middle": Shape([user("a"), said("b"), system("Be brief."), user("c"), said("d")]),
    "ends with the user": Shape([user("a"), said("b"), user("c")]),
    "the assistant opens": Shape([said("Hello."), user("Hi"), said("four")]),
    "two answers in a row": Shape([user("a"), said("one"), said("two")]),
    "unicode": Shape([user("ünï"), said("日本 🙂\u200d↔️ ünïcödé e\u0301")]),
    "whitespace at borders": Shape([user("  a \n"), said("  lead and trail \n"), user("\tb"), said("\nnew\n\n")]),
    "whitespace inside": Shape([user("a"), said("b\n\n\tc  d\r\ne")]),
    "empty answer": Shape([user("a"), said(""), user("b"), said("c")]),
    "empty question": Shape([user(""), said("a")]),
    "same text twice": Shape([user("same"), said("same"), user("same"), said("same")]),
    "answer inside the question": Shape([user("say Hello world."), said("Hello world.")]),
    "role names as content": Shape([user("assistant"), said("user"), user("system"), said("assistant")]),
    "code": Shape([user("a"), said("def f(x):\n    return {'a': x}[0] # </html> {{ y }}\n\n")]),
    "long": Shape([user("a " * 200), said("b c " * 200)]),
    "reasoning": Shape([user("a"), said("four", reasoning_content="two and two")]),
    "reasoning in every turn": Shape(
        [user("a"), said("b", reasoning_content="hm"), user("c"), said("d", reasoning_content="so\n\nit is")]
    ),
    "tools": Shape(CALLED, tools=TOOLS),
    "tools, then more": Shape([system("S"), *CALLED, user("So?"), said("Yes.")], tools=TOOLS),
    "ends with a tool call": Shape(CALLED[:2], tools=TOOLS),
    "reasoning before a call": Shape(
        [
            user("1+1?"),
            {"role": "assistant", "tool_calls": [CALL], "reasoning_content": "add"},
            result("2"),
            said("2."),
        ],
        tools=TOOLS,
    ),
    "last only": Shape(THREE, (2,), options={"turns": "last"}),
    "flags": Shape([user("a"), said("one", train=False), user("b"), said("two"), user("c"), said("3", weight=0)], (1,)),
    "no flag but one": Shape(
        [user("a"), said("one", train=True), user("b"), said("two")], (0,), None, {"train_roles": []}
    ),
    "parts": Shape([user("a"), said([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])]),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def declared(tmp_path_factory) -> dict[str, str]:
    """The built-in templates, by name."""
    config = tmp_path_factory.mktemp("corpus") / "config.yaml"
    section = {"train": [{"path": "none.jsonl"}]}
    config.write_text(f"model: {{name: none}}\nplugins: [templates, data]\noutput: none\ndata: {json.dumps(section)}\n")
    parts = with_templates(compose(config), Processor(tokenizer=None, pad_id=0, fingerprint="")).parts  # type: ignore[arg-type]
    found = parts["chat_templates"]
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def tokenizer_for(declared, tokenizer_with, tokenizer_of):
    """The small tokenizer with a template of the corpus."""

    @lru_cache
    def make(template: str, twins: bool = True, text: str | None = None) -> Any:
        made = tokenizer_of(template[4:]) if template.startswith("trl:") else tokenizer_with(declared[template])
        made = copy.copy(made)
        made.name_or_path, made.twins = template, declared if twins else {}
        made.chat_template = text or made.chat_template
        return made

    return make


def expected(tokenizer, text: str, ranges: list[tuple[int, int]]) -> np.ndarray:
    """Tokens that lie inside one of the ranges, by the offsets that transformers reports."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return np.array([any(start <= a and b <= end for start, end in ranges) for a, b in offsets], dtype=bool)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", FAMILIES)
def test_trained_tokens_are_the_turns_that_a_reader_of_the_text_finds(template, shape, tokenizer_for, masked):
    tokenizer, (messages, trained, tools, options) = tokenizer_for(template), SHAPES[shape]
    try:
        row = masked(tokenizer, messages, tools, **options)
    except DataError as error:
        if "refuses the row" not in error.what:
            raise
        return
    found = turns(template, row.text)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(found) == len(spoken), row.text
    chosen = [found[number] for number in (trained if trained is not None else range(len(found)))]
    mask = expected(tokenizer, row.text, chosen)
    assert row.words == tokenizer.decode(row.ids[mask], skip_special_tokens=False)
    np.testing.assert_array_equal(row.mask, mask)


@pytest.mark.parametrize("template", FAMILIES)
def test_the_text_is_what_transformers_renders(template, tokenizer_for, masked):
    tokenizer = tokenizer_for(template)
    rendered = 0
    for messages, _, tools, options in SHAPES.values():
        plain = [{k: v for k, v in message.items() if k not in ("train", "weight")} for message in messages]
        if not all(isinstance(message.get("content", ""), str) for message in plain):
            continue
        plain = [
            {**message, "thinking": message["reasoning_content"]} if "reasoning_content" in message else message
            for message in plain
        ]
        try:
            text = tokenizer.apply_chat_template(plain, tools=tools, tokenize=False)
        except (jinja2.TemplateError, TypeError):
            continue
        assert masked(tokenizer, messages, tools, **options).text == text
        rendered += 1
    assert rendered >= 10


def test_an_answer_like_a_part_of_its_header_is_not_cut_there(tokenizer_for, masked):
    """Its header holds the answer's only letter, and the answer begins with a space: neither is its end."""
    messages = [user(""), said(" <"), user(""), said("")]
    with pytest.raises(DataError, match="differently in the conversation"):
        masked(tokenizer_for("trl:gptoss", twins=False), messages)


def test_no_template_refuses_what_it_should_take(tokenizer_for, masked):
    """How many shapes each template renders: a template that suddenly refuses rows would pass all else."""
    counts = {}
    for template in FAMILIES:
        counts[template] = 0
        for messages, _, tools, options in SHAPES.values():
            try:
                masked(tokenizer_for(template), messages, tools, **options)
            except DataError:
                continue
            counts[template] += 1
    assert min(counts.values()) >= 18, counts
    assert counts["qwen-3"] == counts["trl:qwen3"] == counts["harmony"] == counts["trl:gptoss"] == len(SHAPES)


words = st.text(alphabet=st.sampled_from(list(" \n\tab.<>|é🙂")), max_size=12)
answers = st.tuples(words, st.one_of(st.none(), words))
talks = st.lists(st.tuples(words, answers), min_size=1, max_size=4)
PAIRS = [("trl:qwen3", "qwen-3"), ("trl:gptoss", "harmony"), ("trl:phi3", "phi-3"), ("trl:gemma3", "gemma-3")]


@pytest.mark.parametrize(("published", "built_in"), PAIRS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talk=talks)
def test_two_constructions_find_the_same_mask(published, built_in, talk, declared, tokenizer_for, masked):
    """Prefixes and borders of a published template, without any twin, against the blocks of the built-in one."""
    messages = []
    for question, (answer, thought) in talk:
        extra = {"reasoning_content": thought} if thought else {}
        messages += [user(question), said(answer, **extra)]
    alone, marked = tokenizer_for(published, twins=False), tokenizer_for(published, text=declared[built_in])
    try:
        found = masked(alone, messages)
    except DataError as error:
        assume("differently in the conversation" not in error.what)
        raise
    exact = masked(marked, messages)
    assert found.text == exact.text
    assert found.words == exact.words
    np.testing.assert_array_equal(found.mask, exact.mask)
