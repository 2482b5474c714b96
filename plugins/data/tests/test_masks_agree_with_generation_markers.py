"""Oracle: transformers' assistant mask, for templates that mark the generated part with `{% generation %}`.

The markers may include the header that the generation prompt gives, and the whitespace after the end of a
turn; ours never does. Beyond that the two must agree token by token.
"""

from __future__ import annotations

import re

import numpy as np
import pytest

TEMPLATES = [
    "cohere_training",
    "cohere2_training",
    "deepseekv3_training",
    "gemma_training",
    "gemma3_training",
    "glm4moe_training",
    "gptoss_training",
    "lfm2_training",
    "llama3_training",
    "nemotron_3_nano_training",
    "phi3_training",
    "qwen2_5_training",
    "qwen3_training",
    "qwen3_5_nothink_training",
    "qwen3_5_think_training",
    "qwen3_vl_training",
]
SHAPES = {
    "one turn": ["Hi", "Hello world."],
    "two turns": ["Hi", "Hello.", "And?", "It is four."],
    "three turns": ["a", "b", "c", "d", "e", "f"],
    "unicode": ["ünï", "日本 🙂 ünïcödé"],
    "code": ["a", "def f():\n    return 1\n\nprint(f())"],
}
GIVEN = re.compile(
    r"<\|start\|>assistant|<｜Assistant｜>|<think>\n*(?:</think>\n\n)?|\n*", flags=re.DOTALL
)  # headers and openers that generation prompts hold, and whitespace


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_trained_tokens_are_those_the_template_marks(template, shape, tokenizer_of, masked):
    tokenizer = tokenizer_of(template)
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": content} for role, content in zip(roles, SHAPES[shape], strict=False)]
    oracle = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = np.array(oracle["assistant_masks"], dtype=bool)
    result = masked(tokenizer, messages)
    assert result.ids.tolist() == list(oracle["input_ids"])
    assert result.mask.any()
    assert "<|start|>assistant" not in result.words, "the generation prompt gives this header to the model"
    assert not (result.mask & ~marked).any()
    borders = np.flatnonzero(np.diff(np.concatenate([[0], (marked & ~result.mask).astype(int), [0]])))
    for start, end in borders.reshape(-1, 2):
        extra = tokenizer.decode(result.ids[start:end], skip_special_tokens=False)
        assert GIVEN.fullmatch(extra), extra
