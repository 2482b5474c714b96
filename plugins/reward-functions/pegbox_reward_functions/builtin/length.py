"""The reward `length`: a soft punishment of long completions, or of the distance to a length.

DAPO (arXiv:2503.14476, eq. 13), for y tokens, at most L of them, of which the last C are punished:

    0                          y <= L - C
    ((L - C) - y) / C          L - C < y <= L
    -1                         L < y
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pegbox.section import Section, setting
from pydantic import model_validator


class LengthOptions(Section):
    """Options of the reward `length`: `max_tokens` and `soft_tokens`, or `target_tokens`."""

    max_tokens: int | None = setting(None, "Completions of more tokens get -1.", unit="tokens", ge=1)
    soft_tokens: int | None = setting(
        None, "The last so many of `max_tokens` cost more and more; a fifth of them if not set.", unit="tokens", ge=1
    )
    target_tokens: int | None = setting(
        None, "In place of the limit: 0 at this length, less with the distance, -1 at 0 and twice as many.", ge=1
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> LengthOptions:
        if (self.max_tokens is None) == (self.target_tokens is None):
            raise ValueError("set one of max_tokens (a limit) and target_tokens (a length)")
        if self.soft_tokens is not None and self.max_tokens is None:
            raise ValueError("soft_tokens is set without max_tokens; it is a part of that; remove it")
        if self.max_tokens is not None and (self.soft_tokens or 0) > self.max_tokens:
            raise ValueError(f"soft_tokens ({self.soft_tokens}) is more than max_tokens ({self.max_tokens})")
        return self


class Length:
    """Counts tokens, the one that ends the completion included."""

    options = LengthOptions

    def open(self, options: LengthOptions) -> Callable[..., list[float | None]]:
        def score(completion_ids: Sequence[Sequence[int]]) -> list[float | None]:
            if options.target_tokens is not None:
                return [distance(len(ids), options.target_tokens) for ids in completion_ids]
            most = options.max_tokens or 1
            soft = options.soft_tokens or max(1, most // 5)
            return [soft_overlong(len(ids), most, soft) for ids in completion_ids]

        return score


def soft_overlong(tokens: int, most: int, soft: int) -> float:
    """DAPO's punishment, eq. 13."""
    if tokens <= most - soft:
        return 0.0
    return (most - soft - tokens) / soft if tokens <= most else -1.0


def distance(tokens: int, target: int) -> float:
    """0 at the target, falling linearly to -1."""
    return -min(1.0, abs(tokens - target) / target)


length = Length()
