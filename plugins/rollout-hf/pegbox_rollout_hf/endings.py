"""What ends a completion: token ids of the model and of the request, and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegbox.rollouts import Sampling

MARGIN = 4
"""Tokens looked at beyond those that a stop text can span: the first ones of a piece may be decoded differently."""


def ending_ids(generation_config: Any, tokenizer: Any, sampling: Sampling) -> tuple[int, ...]:
    """Token ids that end a completion: the end-of-turn tokens of model and tokenizer, and those of the request."""
    return tuple(
        sorted(
            {
                *_listed(getattr(generation_config, "eos_token_id", None)),
                *_listed(getattr(tokenizer, "eos_token_id", None)),
                *sampling.stop_ids,
            }
        )
    )


def _listed(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(one) for one in ids]


class StopTexts:
    """Whether a completion has just come to contain one of the stop texts."""

    def __init__(self, texts: Sequence[str], tokenizer: Any) -> None:
        self._texts, self._tokenizer = tuple(texts), tokenizer
        self.window = max((len(text.encode()) for text in texts), default=0) + MARGIN

    def __bool__(self) -> bool:
        return bool(self._texts)

    def ends(self, completion: Sequence[int]) -> bool:
        """Args:
        completion: its last tokens; `window` of them are enough, because each is a byte of text or more.
        """
        text = self._tokenizer.decode(list(completion[-self.window :]), skip_special_tokens=False)
        return any(stop in text for stop in self._texts)
