"""Each template renders what a published template of its family renders, or what its documentation says.

Published templates are those that ship with TRL; for families that it has none of, the text is written by a short
function here. The renderer is transformers'. The blocks are what generation would have to produce: they begin where
the generation prompt ends.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jinja2
import pytest
from pegbox_templates import TEMPLATES, texts
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PUBLISHED = {
    "llama-3": "llama3",
    "llama-3.1": "llama3_1",
    "qwen-2.5": "qwen2_5",
    "qwen-3": "qwen3",
    "gemma": "gemma",
    "gemma-3": "gemma3",
    "phi-3": "phi3",
    "phi-3.5": "phi3_5",
    "harmony": "gptoss",
    "command-r": "cohere",
}
TRAINING = {
    "llama-3": "llama3_training",
    "qwen-2.5": "qwen2_5_training",
    "gemma": "gemma_training",
    "gemma-3": "gemma3_training",
    "phi-3": "phi3_training",
    "phi-3.5": "phi3_5_training",
    "command-r": "cohere_training",
}
CALL = {"id": "abcdefgh9", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "ü": "x\n"}}}
PROPERTIES = {
    "a": {"type": "integer", "description": "left"},
    "b": {"type": "array", "items": {"type": "string"}},
    "c": {"type": "string", "enum": ["x", "y"], "default": "x"},
    "d": {
        "type": "object",
        "properties": {"z": {"type": "number"}, "w": {"type": ["string", "null"]}},
        "required": ["z"],
    },
    "e": {"oneOf": [{"type": "string"}, {"type": "number", "description": "n", "default": 1}], "default": "q"},
    "f": {"type": "boolean", "default": True},
    "g": {"type": "array", "items": {"type": "object", "properties": {"a" * 60: {"type": "string"}}}},
    "h": {"type": "string", "nullable": True},
    "i": {},
    "j": {"type": "array"},
    "k": {"type": "array", "items": {"type": "object"}, "nullable": True},
    "l": {"oneOf": [{"type": "object"}, {"type": "string"}]},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": PROPERTIES, "required": ["a"]},
        },
    },
    {"type": "function", "function": {"name": "now", "description": "Time.", "parameters": {}}},
]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, thought: str | None = None) -> dict[str, Any]:
    extra = {} if thought is None else {"reasoning_content": thought, "thinking": thought}
    return {"role": "assistant", "content": text, **extra}


def called(thought: str | None = None, content: dict[str, Any] | None = None) -> dict[str, Any]:
    extra = {} if thought is None else {"reasoning_content": thought, "thinking": thought}
    return {"role": "assistant", "tool_calls": [CALL], **extra, **(content or {})}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "abcdefgh9", "name": "add"}


SYSTEM = {"role": "system", "content": "Be kind."}
SHAPES: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([user("Hi"), said("Hello.")], None),
    "system": ([SYSTEM, user(" Hi\n"), said(" Hello. \n"), user("And?"), said("ünï 日本")], None),
    "ends with the user": ([user("a"), said("b"), user("c")], None),
    "thinking": ([user("a"), said("b", "hm"), user("c"), said("d", "calc\n")], None),
    "thinking in tags": (
        [user("a"), said("<think>\nx\n</think>\n\nb"), user("c"), said("<think>\ny\n</think>\n\nd")],
        None,
    ),
    "tools": ([user("a"), called(), result("2"), said("Two.")], TOOLS),
    "tools in the middle": (
        [SYSTEM, user("a"), called("let"), result('{"x": "2\n"}'), said("Two.", "ok"), user("more"), called("let me")],
        TOOLS,
    ),
    "ends with a result": ([user("a"), called(), result("2"), result("3")], TOOLS),
    "empty answer": ([user("a"), said("")], None),
    "two answers in a row": ([user("a"), said("b"), said("c")], None),
    "the assistant opens": ([said("b"), user("a"), said("c")], None),
    "system in the middle": ([user("a"), said("b"), SYSTEM, user("c"), said("d")], None),
}


@lru_cache
def tokenizer(text: str) -> PreTrainedTokenizerFast:
    letters = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))  # type: ignore[call-arg]
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>", chat_template=text)


def own(name: str) -> str:
    return getattr(texts, name.replace("-", "_").replace(".", "_"))


def of_trl(name: str) -> str:
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def rendered(text: str, messages: Any, tools: Any, prompt: bool, **variables: Any) -> str | None:
    try:
        made = tokenizer(text).apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
        )
    except (jinja2.TemplateError, TypeError):
        return None
    return str(made)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", PUBLISHED)
def test_it_renders_what_the_published_template_renders(name, prompt):
    equal = 0
    variants = [{}, {"enable_thinking": False}] if name == "qwen-3" else [{}]
    variants += [{"reasoning_effort": "high", "model_identity": "You are it."}] if name == "harmony" else []
    for shape, (messages, tools) in SHAPES.items():
        for variables in variants:
            expected = rendered(of_trl(PUBLISHED[name]), messages, tools, prompt, **variables)
            if expected is not None:
                assert rendered(own(name), messages, tools, prompt, **variables) == expected, shape
                equal += 1
    assert equal >= 4


def chatml(messages: Any, prompt: bool) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text + ("<|im_start|>assistant\n" if prompt else "")


def zephyr(messages: Any, prompt: bool) -> str:
    return "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages) + ("<|assistant|>\n" if prompt else "")


def alpaca(messages: Any, prompt: bool) -> str:
    heads = {"system": "{}", "user": "### Instruction:\n{}", "assistant": "### Response:\n{}</s>"}
    text = "\n\n".join(heads[m["role"]].format(m["content"]) for m in messages)
    return "<s>" + text + ("\n\n### Response:\n" if prompt else "")


def mistral_v7(messages: Any, prompt: bool) -> str:
    around = {"system": "[SYSTEM_PROMPT]{}[/SYSTEM_PROMPT]", "user": "[INST]{}[/INST]", "assistant": "{}</s>"}
    return "<s>" + "".join(around[m["role"]].format(m["content"]) for m in messages)


def mistral_v3(messages: Any, prompt: bool, gap: str = " ") -> str:
    opens = messages[0]["role"] == "system"
    said_ = messages[opens:]
    last = max(index for index, m in enumerate(said_) if m["role"] == "user")
    text = "<s>"
    for index, m in enumerate(said_):
        before = messages[0]["content"] + "\n\n" if opens and index == last else ""
        if m["role"] == "user":
            text += f"[INST]{gap}{before}{m['content']}[/INST]"
        else:
            text += (" " + m["content"].strip() if gap else m["content"]) + "</s>"
    return text


def deepseek(messages: Any, prompt: bool) -> str:
    text = "<s>" + "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    for m in messages:
        if m["role"] == "user":
            text += "<｜User｜>" + m["content"]
        elif m["role"] == "assistant":
            text += "<｜Assistant｜>" + m["content"].split("</think>")[-1] + "<｜end▁of▁sentence｜>"
    return text + ("<｜Assistant｜>" if prompt else "")


WRITTEN = {
    "chatml": chatml,
    "zephyr": zephyr,
    "alpaca": alpaca,
    "mistral-v7": mistral_v7,
    "mistral-v3": mistral_v3,
    "mistral-v3-tekken": lambda messages, prompt: mistral_v3(messages, prompt, gap=""),
    "deepseek-v3": deepseek,
}
PLAIN = ("one turn", "system", "ends with the user", "thinking in tags", "empty answer")


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("shape", PLAIN)
@pytest.mark.parametrize("name", WRITTEN)
def test_it_renders_what_its_documentation_says(name, shape, prompt):
    messages, _ = SHAPES[shape]
    assert rendered(own(name), messages, None, prompt) == WRITTEN[name](messages, prompt)


def test_calls_and_results_of_deepseek_stand_in_one_turn():
    call = {**CALL, "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        result("2"),
        said("Two."),
    ]
    one = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
    assert rendered(own("deepseek-v3"), messages, None, False) == (
        f"<s><｜User｜>a<｜Assistant｜><｜tool▁calls▁begin｜>{one}\n{one}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>2<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
        "Two.<｜end▁of▁sentence｜>"
    )


def test_calls_and_results_of_mistral_have_their_ids():
    text = rendered(own("mistral-v3"), [user("a"), called(), result("2"), said("Two.")], TOOLS[1:], False)
    tool = json.dumps(TOOLS[1])
    call = json.dumps({**CALL["function"], "id": CALL["id"]}, ensure_ascii=False)  # type: ignore[dict-item]
    assert text == (
        f"<s>[AVAILABLE_TOOLS] [{tool}][/AVAILABLE_TOOLS][INST] a[/INST][TOOL_CALLS] [{call}]</s>"
        '[TOOL_RESULTS] {"content": 2, "call_id": "abcdefgh9"}[/TOOL_RESULTS] Two.</s>'
    )


def generated(text: str, messages: Any) -> list[str]:
    """What transformers says the assistant generates, one string for each block."""
    made = tokenizer(text)
    from transformers.utils.chat_template_utils import render_jinja_template

    full, ranges = render_jinja_template(
        [messages], chat_template=text, return_assistant_tokens_mask=True, **made.special_tokens_map
    )
    return [full[0][start:end] for start, end in ranges[0]]


@pytest.mark.parametrize("name", TRAINING)
def test_blocks_are_those_of_trl_without_the_whitespace_behind_them(name):
    for shape in ("one turn", "system", "ends with the user"):
        messages, _ = SHAPES[shape]
        if name == "gemma" and shape == "system":
            continue
        ours, theirs = (generated(text, messages) for text in (own(name), of_trl(TRAINING[name])))
        assert "".join("".join(ours).split()) == "".join("".join(theirs).split())
        assert [block.rstrip() for block in ours] == ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_blocks_begin_where_the_generation_prompt_ends(name):
    """And end the conversation: with the answer cut off at its block, nothing but the prompt is left."""
    messages = [user("a"), said("first"), user("b"), said("second")]
    text, prompt = (rendered(own(name), m, None, p) for m, p in ((messages, False), (messages[:3], True)))
    assert text is not None
    assert prompt is not None
    blocks = generated(own(name), messages)
    assert len(blocks) == 2
    assert text.startswith(prompt)
    assert text[len(prompt) :].rstrip() == blocks[1]


def test_the_empty_thinking_that_the_prompt_gives_is_not_generated():
    full = own("qwen-3")
    from transformers.utils.chat_template_utils import render_jinja_template

    made, ranges = render_jinja_template(
        [[user("a"), said("b")]], chat_template=full, return_assistant_tokens_mask=True, enable_thinking=False
    )
    assert [made[0][start:end] for start, end in ranges[0]] == ["b<|im_end|>"]
    assert made[0].endswith("<think>\n\n</think>\n\nb<|im_end|>\n")


def test_what_a_template_has_no_place_for_is_refused():
    twice = [user("a"), {**called(), "tool_calls": [CALL, CALL]}]
    assert rendered(own("harmony"), twice, TOOLS, False) is None
    assert rendered(own("llama-3.1"), twice, TOOLS, False) is None
    assert rendered(own("gemma"), [SYSTEM, user("a")], None, False) is None
    assert rendered(own("zephyr"), [user("a"), result("2")], None, False) is None
    assert rendered(own("mistral-v7"), [user("a"), result("2")], None, False) is None
