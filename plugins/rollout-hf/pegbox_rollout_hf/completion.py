"""A completion as it was sampled, and what transformers' generate is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig


@dataclass(frozen=True)
class Completion:
    """One sampled completion of prompt number `prompt`, the `sample`-th of it."""

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


def generation_config(max_tokens: int, pad_id: int, ending: list[int] | None, **sampling: Any) -> GenerationConfig:
    """What generate is told. It fills what is unset with the model's own settings, which are not the request's."""
    plain = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    return GenerationConfig(
        **{**plain, **sampling},
        max_new_tokens=max_tokens,
        pad_token_id=pad_id,
        eos_token_id=ending,
        num_beams=1,
        num_return_sequences=1,
        use_cache=True,
        return_dict_in_generate=False,
    )
