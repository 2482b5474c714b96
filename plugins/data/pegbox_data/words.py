"""Words whose tokens are remembered, for byte-level BPE.

Such a tokenizer cuts a text at its added tokens, cuts what lies between into words by one regular expression, and makes
tokens of each word alone. Words repeat, so their tokens are asked of the tokenizer's own model once and looked up
afterwards, in a sixth of the time. That is done only where it cannot differ: for pipelines of this
form with a known expression, and for texts of plain ASCII, in which all engines of regular expressions agree on what a
letter and a space are. Everything else goes through the tokenizer as a whole.

The expressions are those of the published `tokenizer.json` of GPT-2, Llama 3 and Qwen 2.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tokenizers import Tokenizer
    from tokenizers.models import Model

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KNOWN = (GPT2, LLAMA3, QWEN2)
PLAIN = re.compile(r"[\t\n\r -~]*")
"""Texts in which every expression means the same to every engine."""
SHOWN = str.maketrans({" ": "Ġ", "\n": "Ċ", "\t": "ĉ", "\r": "č"})
"""How byte-level vocabularies write the bytes of plain ASCII that they do not write as themselves."""
MOST_WORDS, LONGEST_WORD = 200_000, 32
"""What is remembered: some tens of MiB at most."""


class Words(dict[str, bytes]):
    """The ids of words, as bytes of int32; those of a word that is not there are asked of the model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> bytes:
        ids = np.array([token.id for token in self._model.tokenize(word.translate(SHOWN))], dtype=np.int32).tobytes()
        if len(self) < MOST_WORDS and len(word) <= LONGEST_WORD:
            self[word] = ids
        return ids


class WordTokenizer:
    """Tokenizes plain texts by their words.

    Args:
        model: makes tokens of a word.
        expression: finds the words of a text.
        added: tokens that are found before words are.
    """

    def __init__(self, model: Model, expression: str, added: list[str]) -> None:
        ascii_only = expression.replace(r"[^\s\p{L}\p{N}]", r"[^\sa-zA-Z0-9]").replace(
            r"[^\r\n\p{L}\p{N}]", r"[^\r\na-zA-Z0-9]"
        )
        ascii_only = ascii_only.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
        self._find = re.compile(ascii_only, re.ASCII).findall
        self._ids = Words(model)
        # Of several tokens that begin at one place the longest is meant.
        longest_first = sorted(filter(str.isascii, added), key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split if longest_first else None
        self._added: dict[str, bytes] = {}

    @classmethod
    def of(cls, backend: Tokenizer) -> WordTokenizer | None:
        """For a tokenizer whose pipeline is of the known form, or None."""
        added = backend.get_added_tokens_decoder()
        if any(token.normalized or token.single_word or token.lstrip or token.rstrip for token in added.values()):
            return None
        expression = _expression(backend)
        if expression is None or backend.encode_special_tokens:
            return None
        made = cls(backend.model, expression, [token.content for token in added.values()])
        made._added = {token.content: np.int32(number).tobytes() for number, token in added.items()}
        return made

    def __call__(self, text: str) -> np.ndarray | None:
        """The ids of a text, int32; None if it is not plain."""
        if PLAIN.fullmatch(text) is None:
            return None
        find, ids_of = self._find, self._ids.__getitem__
        if self._cut is None:
            return np.frombuffer(b"".join(map(ids_of, find(text))), dtype=np.int32)
        ids: list[bytes] = []
        for number, piece in enumerate(self._cut(text)):
            if number % 2:
                ids.append(self._added[piece])
            else:
                ids += map(ids_of, find(piece))
        return np.frombuffer(b"".join(ids), dtype=np.int32)


def _expression(backend: Tokenizer) -> str | None:
    """The regular expression of the words, if nothing but it, byte-level letters and BPE act on a plain text."""
    if type(backend.model).__name__ != "BPE":
        return None
    model: Any = backend.model
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return None
    if not _leaves_ascii_alone(_state(backend.normalizer)):
        return None
    steps = _state(backend.pre_tokenizer)
    listed = steps.get("pretokenizers", [steps] if steps else [])
    if not listed or listed[-1].get("type") != "ByteLevel" or listed[-1].get("add_prefix_space"):
        return None
    if len(listed) == 1:
        return GPT2 if listed[0].get("use_regex") else None
    if len(listed) != 2 or listed[-1].get("use_regex"):
        return None
    split = listed[0]
    pattern = split.get("pattern", {}).get("Regex")
    plain = split.get("type") == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
    return pattern if plain and pattern in KNOWN else None


def _leaves_ascii_alone(normalizer: Mapping[str, Any]) -> bool:
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    return all(step.get("type") in ("NFC", "NFKC", "NFD", "NFKD") for step in steps)


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its `tokenizer.json` writes it; empty if there is none."""
    if part is None:
        return {}
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state
