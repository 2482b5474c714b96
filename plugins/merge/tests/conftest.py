"""Tiny bases on disk, and adapters of every kind on them, made by PEFT with random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parent))

from tiny_bases import BASES

OPENS = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
MakeAdapter = Callable[..., Path]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    made.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<end>{% endfor %}"
    return made


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """`bases("llama", torch.bfloat16)`: the folder of a tiny random model; made once."""
    made: dict[Any, Path] = {}

    def open_base(kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
        if (kind, dtype, shard) not in made:
            folder = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            model = BASES[kind]().to(dtype)
            model.generation_config.eos_token_id = 0
            model.save_pretrained(folder, max_shard_size=shard)
            tokenizer.save_pretrained(folder)
            made[kind, dtype, shard] = folder
        return made[kind, dtype, shard]

    return open_base


@pytest.fixture
def adapter_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> MakeAdapter:
    """`adapter_on(base, r=4, ...)`: the folder of an adapter whose weights all moved off their beginning."""

    def make(base: Path, *, size: float = 0.05, labels: int = 1, **settings: Any) -> Path:
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings})
        torch.manual_seed(1)
        model = OPENS[config.task_type].from_pretrained(base, num_labels=labels)
        wrapped = peft.get_peft_model(model, config)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape).to(parameter.dtype))
        folder = tmp_path / "run"
        wrapped.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make
