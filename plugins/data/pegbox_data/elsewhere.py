"""What formats of other trainers are called here: for the error of a config that names one of theirs."""

from __future__ import annotations

CHAT = (
    "chat with fields: {messages: conversations, role: from, content: value} and "
    "options: {roles: {human: user, gpt: assistant}}"
)
PREFERENCE = "preference"
IMPLICIT = "preference: answers that hold the whole conversation share their beginning, which is the prompt"
UNPAIRED = "unpaired, or unpaired with options: {unpair: true} for rows with chosen and rejected"
NAMED = {
    "sharegpt": CHAT,
    "chat_template": "chat",
    "messages": "chat",
    "openai": "chat",
    "alpaca_chat": "alpaca with options: {chat_template: true}",
    "alpaca_instruct": "alpaca",
    "alpaca_w_system": "alpaca",
    "prompt_completion": "completion",
    "text": "pretraining",
    "pretrain": "pretraining",
    "tokenized": "tokens",
    "stepwise_supervised": "steps",
    "stepwise_supervision": "steps",
    "chat_template.default": "preference with fields: {prompt: messages}",
    "chat_template.argilla_chat": IMPLICIT,
    "chat_template.argilla": IMPLICIT,
    "zephyr.nectar": "preference with options: {layout: nectar}",
    "passthrough": "preference with options: {chat_template: false}",
    "user_defined": "preference or unpaired with fields: {prompt: ..., chosen: ..., rejected: ...} and "
    "options: {chat_template: false, prompt_format: ..., answer_format: ...}",
    "bradley_terry.chat_template": "preference with options: {layout: icr}",
    "bradley_terry.llama3.icr": "preference with options: {layout: icr}",
    "dpo": PREFERENCE,
    "orpo": PREFERENCE,
    "simpo": PREFERENCE,
    "ranking": PREFERENCE,
    "reward": PREFERENCE,
    "explicit_prompt": PREFERENCE,
    "implicit_prompt": IMPLICIT,
    "kto": UNPAIRED,
    "unpaired_preference": UNPAIRED,
    "prompt_only": "prompts",
    "prompt-only": "prompts",
    "grpo": "prompts",
}
"""Names, and what they are here."""
FAMILIES = {"chatml": "chatml", "llama3": "llama_3"}
"""Axolotl's transforms with a template written out, and its name here: of the plugin `templates`."""
LAYOUTS = ("argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra")


def here(name: str) -> str | None:
    """What a format of another trainer is here; None if nobody has one of this name."""
    family, _, layout = name.partition(".")
    if family in FAMILIES:
        if layout in LAYOUTS:
            return f"preference (or unpaired, for rows with a label) with options: {{layout: {layout}}}"
        template = f"hf.chat_template: {FAMILIES[family]}"
        return f"preference (or unpaired, for rows with a label), with {template} if the tokenizer has another template"
    return NAMED.get(name) or NAMED.get(family)
