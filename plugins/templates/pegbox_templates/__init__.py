"""Chat templates by name, each with `{% generation %}` blocks around exactly what the assistant generates.

`hf.chat_template` selects one, which the exported tokenizer then carries. To the data they are also twins: where a
tokenizer's own template rewrites history and has no blocks, one of these that renders the same text gives the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.types import Item

TEMPLATES = {
    "chatml": "ChatML, as many models have it.",
    "llama-3": "Llama 3, without tools.",
    "llama-3.1": "Llama 3.1 and 3.3, with tools.",
    "qwen-2.5": "Qwen 2.5, with tools.",
    "qwen-3": "Qwen 3, with tools and thinking.",
    "gemma": "Gemma and Gemma 2.",
    "gemma-3": "Gemma 3, with a system message.",
    "mistral-v3": "Mistral v3, with tools.",
    "mistral-v3-tekken": "Mistral v3 for Tekken vocabularies, with tools.",
    "mistral-v7": "Mistral v7 for Tekken vocabularies.",
    "phi-3": "Phi 3.",
    "phi-3.5": "Phi 3.5.",
    "deepseek-v3": "DeepSeek V3, with tools.",
    "harmony": "Harmony, the format of gpt-oss, with tools and thinking.",
    "alpaca": "Alpaca's headings.",
    "zephyr": "Zephyr.",
    "command-r": "Command R and Aya.",
}


class TemplatesPlugin:
    """Declares the templates; it has no section."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [
            Item(
                kind="template",
                name=name,
                target=f"pegbox_templates.texts:{name.replace('-', '_').replace('.', '_')}",
                doc=doc,
            )
            for name, doc in TEMPLATES.items()
        ]
