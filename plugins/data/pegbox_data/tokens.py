"""The format `tokens`: rows that were tokenized elsewhere, taken as they are.

Their labels say what is trained (-100: not); without labels every token is, but those that an attention mask hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.rows import UNTRAINED
from pegbox.section import Section

from pegbox_data.findings import Found
from pegbox_data.formats import Rendered, Tokens, column
from pegbox_data.messages import parsed, shown

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow


class TokensOptions(Section):
    """The format `tokens` has no options."""


class TokensFormat:
    """Rows with `input_ids`; `labels` and `attention_mask` may be missing."""

    fields: ClassVar[Mapping[str, str]] = {
        "input_ids": "input_ids",
        "labels": "labels",
        "attention_mask": "attention_mask",
    }
    options = TokensOptions

    def open(self, fields: Mapping[str, str], options: TokensOptions, processor: Processor) -> Renderer:
        size = len(processor.tokenizer)
        eos = processor.tokenizer.eos_token_id if processor.tokenizer.eos_token_id == processor.pad_id else None

        def render(row: SourceRow) -> Rendered:
            ids = _integers(column(row, fields["input_ids"], "input_ids"), fields["input_ids"], None)
            wrong = next((number for number in ids if not 0 <= number < size), None)
            if wrong is not None:
                raise DataError(
                    f"'{fields['input_ids']}' holds the id {wrong}",
                    f"The tokenizer knows {size:,} tokens: the row was made with another one.",
                    "Tokenize the data with this model's tokenizer.",
                )
            seen = row.get(fields["attention_mask"])
            labels = row.get(fields["labels"])
            mask = _integers(seen, fields["attention_mask"], len(ids)) if seen is not None else [1] * len(ids)
            given = _integers(labels, fields["labels"], len(ids)) if labels is not None else ids
            kept = [index for index, visible in enumerate(mask) if visible]
            ids, given = [ids[index] for index in kept], [given[index] for index in kept]
            return Rendered("", [], tokens=Tokens(ids, _trained(ids, given, fields)), notes=_unended(ids, given, eos))

        return render


tokens = TokensFormat()


def _trained(ids: Sequence[int], labels: Sequence[int], fields: Mapping[str, str]) -> list[bool]:
    for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label not in (token, UNTRAINED):
            raise DataError(
                f"'{fields['labels']}' holds {label} at position {at}, where the token is {token}",
                "A label is its token, or -100 where nothing is trained; shifting them is the trainer's work.",
                "Write the labels again, unshifted.",
            )
    return [label != UNTRAINED for label in labels]


def _unended(ids: Sequence[int], labels: Sequence[int], eos: int | None) -> tuple[Found, ...]:
    """A finding if an end token that is the padding token too follows a trained one and is not trained."""
    if eos is None:
        return ()
    for (_, before), (token, label) in pairwise(zip(ids, labels, strict=True)):
        if before != UNTRAINED and token == eos and label == UNTRAINED:
            return (Found("pad-is-eos-untrained", f"token {eos} ends a trained part, but is not trained"),)
    return ()


def _integers(value: Any, name: str, length: int | None) -> list[int]:
    listed = parsed(value, name)
    if not isinstance(listed, list | tuple) or not all(type(number) is int for number in listed):
        raise DataError(f"'{name}' is {shown(value)}", "It must be a list of integers.", "Correct the row.")
    if length is not None and len(listed) != length:
        raise DataError(
            f"'{name}' has {len(listed)} values for {length} tokens", "They belong together.", "Correct the row."
        )
    return list(listed)
