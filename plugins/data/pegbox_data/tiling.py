"""Where tokens lie in a text, from the bytes of the tokens themselves: for byte-level vocabularies.

The tokens of such a vocabulary, written one after the other, are the text's bytes. If they are, byte by byte, then the
sums of their lengths are their places, and the tokenizer need not report any: that saves a quarter of its time. A row
whose tokens do not add up to its text (a normalizer changed it, a special token swallowed a space) is left to the
tokenizer's own offsets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from pegbox_data.formats import Span


class Tiling:
    """The bytes of every token of a byte-level vocabulary.

    Args:
        pieces: the bytes of each token by id; None where a token has none.
    """

    def __init__(self, pieces: Sequence[bytes | None]) -> None:
        self._pieces = pieces
        self._lengths = np.array([len(piece or b"") for piece in pieces], dtype=np.int64)

    @classmethod
    def of(cls, backend: Tokenizer) -> Tiling | None:
        """The tiling of a tokenizer; None if its vocabulary is not one of bytes."""
        if "ByteLevel" not in repr(backend.decoder) or not hasattr(backend, "encode_batch_fast"):
            return None
        byte_of = _byte_alphabet()
        vocabulary = backend.get_vocab(with_added_tokens=True)
        pieces: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        for token, number in vocabulary.items():
            if number in added:
                pieces[number] = added[number].encode()
            else:
                try:
                    pieces[number] = bytes([byte_of[letter] for letter in token])
                except KeyError:
                    continue
        return cls(pieces)

    def places(self, ids: np.ndarray, text: str) -> np.ndarray | None:
        """The byte where each token begins, and where the last one ends; None if the tokens are not the text."""
        pieces = self._pieces
        try:
            written = b"".join([pieces[number] for number in ids.tolist()])
        except TypeError:
            return None
        if written != text.encode():
            return None
        return np.concatenate([[0], np.cumsum(self._lengths[ids])])


def tokens_of(places: np.ndarray, span: Span, text: str, ascii_text: bool) -> tuple[int, int, int]:
    """The range of a span's tokens, and how many tokens reach over one of its two borders."""
    start, end, limit = (at if ascii_text else len(text[:at].encode()) for at in span)
    first = int(np.searchsorted(places[:-1], start))
    outside = int(first > 0 and places[first] > start)
    last = max(first, int(np.searchsorted(places[:-1], end)))
    if last > first and places[last] > limit:
        return first, last - 1, outside + 1
    return first, last, outside


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    letters = {chr(byte): byte for byte in shown}
    return {**letters, **{chr(256 + number): byte for number, byte in enumerate(hidden)}}
