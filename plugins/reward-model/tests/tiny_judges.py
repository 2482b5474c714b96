"""Reward models of transformers with random weights on disk, and tokenizers for them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m['role'] }}] {{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
OPENS = {"outcome": AutoModelForSequenceClassification, "process": AutoModelForTokenClassification}


def tokenizer_of(corpus: str, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level pairs, learnt from a corpus; with an end and a padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([corpus], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|im_end|>")
    made.chat_template = template
    return made


def judge(folder: Path, kind: Literal["outcome", "process"] = "outcome", seed: int = 0, **changes: object) -> Path:
    """The folder of a reward model whose scores differ clearly, without a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    asked = {"num_labels": 1 if kind == "outcome" else 2, "pad_token_id": 0, **changes}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **asked)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = OPENS[kind].from_config(config)
    with torch.no_grad():
        model.score.weight.mul_(30)
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(20)
    model.save_pretrained(folder)
    return folder
