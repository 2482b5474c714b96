"""Sampling in the process that trains (plugin rollout-hf): what is in memory while completions are made.

Weights and the optimizer's state stay. On top of them come the keys and values of all completions that are sampled at
once, which are as long as prompt and completion together, and logits of next tokens. One forward over the prompts and
one that adds the last token are made on tensors without data; the cache has the sizes that the model itself gives it,
for one row, times rows.

    P  prompts    R  completions    T  tokens    V  vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pegbox_memory.step import TrainedStep

ENGINE, GRPO = "rollout-hf", "grpo"
STATIC = frozenset({"frozen weights", "reference", "trained weights", "adapters", "buffers", "optimizer"})


@dataclass
class Peak:
    """The most that one step has in memory, in bytes by kind, and what it is doing then."""

    bytes: dict[str, int]
    during: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


@dataclass(frozen=True)
class Generation:
    """Completions that are sampled at once.

    Attributes:
        rows: how many; `prompts`: of so many prompts.
        prompt: tokens of the longest prompt; `tokens`: with the longest completion.
    """

    rows: int
    prompts: int
    prompt: int
    tokens: int


def generation_of(
    sections: Mapping[str, Any], length: int, prompts: int, *, on_gpu: bool
) -> tuple[Generation | None, list[str]]:
    """What a config samples at once in this process, and what is not counted of it.

    Args:
        sections: of the resolved config.
        length: tokens of the longest prompt.
        prompts: of a generation.
    """
    online, engine = sections[GRPO], sections.get(ENGINE)
    if engine is None:
        return None, ["completions are made elsewhere; what that takes of this device is not counted"]
    if engine["continuous"] == "on" or (engine["continuous"] == "auto" and on_gpu):
        return None, [f"{ENGINE}.continuous fills what is free with keys and values, or {ENGINE}.cache_share of it"]
    rows = min(engine["batch"], prompts * online["samples"])
    made = Generation(rows, math.ceil(rows / online["samples"]), length, length + online["max_completion_length"])
    return made, []


def sampling_peak(step: TrainedStep, generation: Generation) -> Peak:
    """The most that is in memory while completions are sampled, in bytes by kind."""
    from pegbox_memory.held import held_cache

    ledger, network, made = step.ledger, step.model.module, generation
    trained = [part for part in network.modules() if part.training]
    network.eval()

    def forward(rows: int, tokens: int, **more: Any) -> Any:
        ids_RT = torch.zeros(rows, tokens, dtype=torch.long, device=step.device)
        return network(input_ids=ids_RT, use_cache=True, logits_to_keep=1, **more)

    try:
        with step.mode, torch.no_grad(), step.arithmetic():
            cache = held_cache(network.config)
            forward(1, made.tokens, past_key_values=cache)
            with ledger:
                ledger.restart()
                ledger.during = "sampling"
                forward(made.prompts, made.prompt).logits.float()
                cache.batch_repeat_interleave(made.rows)
                kept = [_bytes(layer) for layer in cache.layers]
                # A layer whose rows become fewer, or that gets more room, is there twice for a moment.
                twice = torch.empty(max(kept), dtype=torch.uint8, device=step.device)
                del twice
                logits_RV = forward(made.rows, 1, past_key_values=cache).logits[:, -1].float()
                probability_RV = logits_RV.softmax(-1)
                probability_RV.cumsum(-1)
                peak = dict(ledger.peak)
            del cache, logits_RV, probability_RV
    finally:
        for part in trained:
            part.training = True
    sizes = {kind: size for kind, size in peak.items() if kind in STATIC}
    dynamic = sum(peak.values()) - sum(sizes.values())
    cached = min(dynamic, sum(kept))
    return Peak({**sizes, "cache": cached, "sampling": dynamic - cached}, "sampling of completions")


def _bytes(layer: Any) -> int:
    return sum(tensor.nbytes for tensor in vars(layer).values() if isinstance(tensor, Tensor))
