"""Text with trained spans as token ids with a mask.

A text is tokenized once and whole: pieces tokenized apart would give other tokens at their borders than the
model will see. Which characters a token covers is known from its bytes, or from the tokenizer; a token is
trained if it begins inside a span and ends by the span's limit. A token that reaches over a border belongs to
neither side: it is not trained, and it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pegbox.errors import DataError
from tokenizers.processors import Sequence as Processors

from pegbox_data.findings import Found
from pegbox_data.tiling import Tiling, tokens_of
from pegbox_data.words import WordTokenizer

if TYPE_CHECKING:
    from pegbox.types import Processor
    from tokenizers import Encoding, Tokenizer

    from pegbox_data.formats import Rendered, Span, Tokens

SPARE = 0.1
"""The share of a row's trained tokens that may be lost at borders."""


@dataclass(slots=True)
class Encoded:
    """One row: `ids` int32 and `trained` bool, both of length T; `border_tokens` were left out of it."""

    ids: np.ndarray
    trained: np.ndarray
    border_tokens: int


class Encoder:
    """Tokenizes rendered rows with a processor's fast tokenizer."""

    def __init__(self, processor: Processor) -> None:
        tokenizer = processor.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or type(tokenizer).__name__} is no fast tokenizer",
                "Masks need to know which characters each token covers.",
                "Use a model that comes with a tokenizer.json.",
            )
        self._backend: Tokenizer = backend
        self._bos = _prefix(backend)
        self._tiling = Tiling.of(backend)
        self._words = WordTokenizer.of(backend) if self._tiling is not None else None
        self._eos: int | None = tokenizer.eos_token_id
        self._bos_id: int | None = tokenizer.bos_token_id

    @contextmanager
    def session(self) -> Iterator[Encoder]:
        """Around `encode`: the tokenizer without padding, truncation and post-processing, put back as it was
        afterwards.

        Post-processors add special tokens, which templates have written already, and some (Llama 3's) report
        a token's characters without the spaces it covers, which hides tokens that reach over a border.
        """
        backend = self._backend
        processor, padding, truncation = backend.post_processor, backend.padding, backend.truncation
        backend.post_processor = Processors([])
        backend.no_padding()
        backend.no_truncation()
        try:
            yield self
        finally:
            if processor is not None:
                backend.post_processor = processor
            if padding:
                backend.enable_padding(**padding)
            if truncation:
                backend.enable_truncation(**truncation)

    def encode(self, rows: Sequence[Rendered]) -> list[Encoded]:
        """Tokenize rows in one batch; those that came as tokens are taken as they are."""
        known = [None if self._words is None or row.tokens is not None else self._words(row.text) for row in rows]
        texts = [row.text for row, ids in zip(rows, known, strict=True) if row.tokens is None and ids is None]
        if self._tiling is None:
            encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        else:
            encodings = iter(self._backend.encode_batch_fast(texts, add_special_tokens=False))
        encoded: list[Encoded] = []
        for row, ids in zip(rows, known, strict=True):
            if row.tokens is not None:
                encoded.append(_given(row.tokens))
            elif ids is not None:
                encoded.append(self._row(row, ids, None))
            else:
                encoding = next(encodings)
                encoded.append(self._row(row, np.array(encoding.ids, dtype=np.int32), encoding))
        return encoded

    def _row(self, row: Rendered, ids: np.ndarray, encoding: Encoding | None) -> Encoded:
        trained = np.zeros(len(ids), dtype=bool)
        border_tokens = 0
        for first, last, outside in self._ranges(row, ids, encoding):
            trained[first:last] = True
            border_tokens += outside
        if row.bos and self._bos and not (len(ids) and ids[0] == self._bos[0]):
            ids = np.concatenate([np.array(self._bos, dtype=np.int32), ids])
            trained = np.concatenate([np.zeros(len(self._bos), dtype=bool), trained])
        if row.eos:
            if self._eos is None:
                raise DataError(
                    "the tokenizer has no EOS token",
                    "Plain text must end with it.",
                    "Set it in tokenizer_config.json.",
                )
            ids, trained = np.append(ids, np.int32(self._eos)), np.append(trained, row.eos_trained)
        if row.everywhere:
            trained |= np.isin(ids, row.everywhere)
        return Encoded(ids, trained, border_tokens)

    def _ranges(self, row: Rendered, ids: np.ndarray, encoding: Encoding | None) -> Iterator[tuple[int, int, int]]:
        """For each span the range of its tokens, and how many reach over its borders."""
        if self._tiling is not None:
            places = self._tiling.places(ids, row.text)
            if places is not None:
                is_ascii = row.text.isascii()
                yield from (tokens_of(places, span, row.text, is_ascii) for span in row.spans)
                return
            encoding = None  # nobody reported characters: this row's are asked for
        if encoding is None:
            encoding = self._backend.encode(row.text, add_special_tokens=False)
        yield from (_tokens(encoding, span, len(row.text)) for span in row.spans)

    def audit(self, row: Rendered, encoded: Encoded) -> list[Found]:
        """What is unusual about a row: what its format noted, and what its tokens show."""
        empty = [one for one in row.notes if one.id == "no-trained-token"]
        found = [one for one in row.notes if one.id != "no-trained-token"]
        lost, trained = encoded.border_tokens, int(np.count_nonzero(encoded.trained))
        if not trained and not row.prompt:
            seen = f"no token of this row is trained ({len(encoded.ids)} tokens)"
            return empty or [Found("no-trained-token", seen)]
        if lost > 1 and lost > SPARE * (lost + trained):
            found.append(Found("span-inside-token", f"{lost} tokens reach over borders, {trained} are trained"))
        elif lost:
            found += [Found("border-token")] * lost
        if self._bos_id is not None and encoded.ids[:2].tolist() == [self._bos_id] * 2:
            found.append(Found("doubled-bos", "the row begins with two BOS tokens"))
        return found


def _given(tokens: Tokens) -> Encoded:
    return Encoded(np.asarray(tokens.ids, dtype=np.int32), np.asarray(tokens.trained, dtype=bool), 0)


def _tokens(encoding: Encoding, span: Span, length: int) -> tuple[int, int, int]:
    """The range of a span's tokens, and how many tokens reach over one of its two borders."""
    count = len(encoding)
    first, outside = _token_at(encoding, span.start, length), 0
    while first < count and _chars(encoding, first)[0] < span.start:
        first, outside = first + 1, 1
    last = max(first, _token_at(encoding, span.end, length))
    while last < count and _chars(encoding, last)[0] < span.end:
        if _chars(encoding, last)[1] > span.limit:
            return first, last, outside + 1
        last += 1
    return first, last, outside


def _token_at(encoding: Encoding, at: int, length: int) -> int:
    """The first token that covers character `at` or a later one."""
    while at < length:
        token = encoding.char_to_token(at)
        if token is not None:
            return int(token)
        at += 1
    return len(encoding)


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    chars = encoding.token_to_chars(token)
    return chars if chars is not None else (0, 0)


def _prefix(backend: Tokenizer) -> list[int]:
    """What the tokenizer's post-processor puts before a text, such as BOS."""
    bare, full = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    return list(full[: full.index(bare[0])]) if bare and bare[0] in full else []
