"""Answers to many prompts: batches of similar length, padded on the left, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pegbox_chat.sampling import Choice, processors
from pegbox_chat.speaker import end_ids

if TYPE_CHECKING:
    from pegbox_chat.opened import OpenModel
    from pegbox_chat.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt.

    Attributes:
        index: of the prompt.
        text: without special tokens.
        tokens: how many were generated, the end token included.
        finish: `stop` if the model ended its answer, `length` if it was cut at the longest allowed.
    """

    index: int
    text: str
    tokens: int
    finish: Literal["stop", "length"]


def batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Prompts of similar length together, longest first: what does not fit into memory shows at once."""
    ordered = sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def answers(model: OpenModel, prompts: Sequence[Prompt], size: int, choice: Choice) -> Iterator[list[Answer]]:
    """The answers of one batch after the other."""
    for batch in batches(prompts, size):
        yield _answer(model, batch, choice)


def _answer(model: OpenModel, batch: Sequence[Prompt], choice: Choice) -> list[Answer]:
    import torch
    from transformers import LogitsProcessorList

    longest, device = max(len(prompt.ids) for prompt in batch), model.module.device
    ids_BT = torch.full((len(batch), longest), model.pad_id, device=device)
    mask_BT = torch.zeros_like(ids_BT)
    for place, prompt in enumerate(batch):
        ids_BT[place, longest - len(prompt.ids) :] = torch.tensor(prompt.ids, device=device)
        mask_BT[place, longest - len(prompt.ids) :] = 1
    ends = end_ids(model.module, model.tokenizer)
    with torch.inference_mode():
        written_BT = model.module.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=choice.max_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList(processors(choice, [p.index for p in batch], longest)),
            eos_token_id=ends or None,
            pad_token_id=model.pad_id,
        )
    new = written_BT[:, longest:].tolist()
    return [_read(model, prompt, ids, set(ends)) for prompt, ids in zip(batch, new, strict=True)]


def _read(model: OpenModel, prompt: Prompt, ids: list[int], ends: set[int]) -> Answer:
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if stop is None else ids[: stop + 1]
    text = model.tokenizer.decode(kept, skip_special_tokens=True)
    return Answer(prompt.index, str(text), len(kept), "length" if stop is None else "stop")
