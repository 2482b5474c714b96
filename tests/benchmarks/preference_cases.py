"""The models, pairs and adapters of which `preference_packing.py` measures DPO, on a GPU and on a CPU."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

PROMPT, ANSWER, LONGEST, SIGMA = 60, 100, 1024, 0.9


@dataclass(frozen=True)
class Setting:
    """What is trained on a kind of device.

    Attributes:
        length: tokens of a bin; `bins` of them are a micro-batch.
        shorter: what lengths of prompts and answers are divided by.
        pairs: of a step; `micro_batch` of them are padded together.
        same_loss: how far losses may be apart. bf16 rounds sums of hundreds of log-probabilities; in fp32 on a GPU
            losses of packed and padded pairs are 2e-5 apart (four layers of this model).
    """

    model: Mapping[str, Any]
    dtype: str
    precision: str
    length: int
    bins: int
    shorter: int
    pairs: int
    micro_batch: int
    same_loss: float
    ours: Mapping[str, Mapping[str, Any]]


LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": True,
}
LLAMA_SMALL = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}
GPU_PLUGINS: Mapping[str, Mapping[str, Any]] = {
    "attention": {"implementation": "pegbox"},
    "cce": {},
    "lora-kernels": {},
}
SETTINGS = {
    "cuda": Setting(LLAMA_1B, "bfloat16", "bf16", 16384, 1, 1, 32, 8, 5e-3, GPU_PLUGINS),
    "cpu": Setting(LLAMA_SMALL, "float32", "fp32", 512, 1, 4, 32, 8, 1e-4, {}),
}


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Of both documents."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def pairs_of(setting: Setting) -> list[Pair]:
    """The pairs of every step."""
    source, vocabulary = random.Random(0), setting.model["vocab_size"]
    longest = LONGEST // setting.shorter

    def length(median: float, most: int) -> int:
        drawn = source.lognormvariate(0.0, SIGMA) * median / setting.shorter
        return max(4, min(round(drawn), most))

    def ids(count: int) -> list[int]:
        return [source.randrange(3, vocabulary) for _ in range(count)]

    made = []
    for _ in range(setting.pairs):
        prompt = ids(length(PROMPT, longest // 2))
        answers = [ids(length(ANSWER, longest - len(prompt))) for _ in range(2)]
        made.append(Pair(prompt, *answers))
    return made


def fill_adapters(module: torch.nn.Module) -> None:
    """Numbers for every LoRA matrix that depend on its name alone."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_" in name:
                plain = name.split("layers.")[-1].replace(".default", "")
                values = torch.randn(weight.shape, generator=torch.Generator().manual_seed(sum(map(ord, plain))))
                weight.copy_(values * (0.02 if "lora_A" in name else 0.002))
