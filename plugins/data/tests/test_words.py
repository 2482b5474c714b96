"""Tokens by remembered words are those that the tokenizer makes of the whole text."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox_data.words import GPT2, LLAMA3, QWEN2, WordTokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Hello world, what's the answer? It is 4.\n\nI think so; don't you?\n\n  lead\ttrail new one two 123 4567",
    "def f(x):\n    return {'a': x}[0]  # </html> {{ y }}\r\n\r\nWE'LL SEE, I'M SURE... they'Re '' ''s 's ünïcödé 日本",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|im", "</s>", "日"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


PIPELINES = {
    "gpt2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "gpt2 as a split": (None, split(GPT2), False),
    "llama3": (None, split(LLAMA3), True),
    "qwen2": (normalizers.NFC(), split(QWEN2), False),
}
OTHERS = {
    "digits apart": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
        False,
    ),
    "a space before": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), False),
    "another expression": (None, split(r"\w+|\W+"), False),
    "lower case": (normalizers.Lowercase(), pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "no words": (None, BYTES, False),
    "joined to the next": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(GPT2), "removed"), BYTES]), False),
}


@lru_cache
def backend(name: str) -> Tokenizer:
    normalizer, words, whole = {**PIPELINES, **OTHERS}[name]
    made = Tokenizer(models.BPE(ignore_merges=whole))
    made.pre_tokenizer, made.decoder = words, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return made


@lru_cache
def by_words(name: str) -> WordTokenizer | None:
    return WordTokenizer.of(backend(name))


pieces = st.sampled_from(
    [*SPECIAL, *CORPUS, *" \n\t\r'.!<|>0129aZ{}", "  ", "'s", "'LL", " don't", "\x1c", "\x0b", "é"]
)
texts = st.one_of(
    st.lists(pieces, max_size=25).map("".join), st.text(max_size=40), st.text(st.characters(codec="ascii"))
)


@pytest.mark.parametrize("name", PIPELINES)
@settings(deadline=None, max_examples=150)
@given(text=texts)
def test_ids_are_those_of_the_whole_text(name: str, text: str) -> None:
    tokenizer = by_words(name)
    assert tokenizer is not None
    ids = tokenizer(text)
    plain = all(letter in "\t\n\r" or " " <= letter <= "~" for letter in text)
    assert (ids is not None) == plain
    if ids is not None:
        assert ids.tolist() == backend(name).encode(text, add_special_tokens=False).ids
        assert ids.dtype.name == "int32"


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_are_left_to_the_tokenizer(name: str) -> None:
    assert by_words(name) is None


@pytest.mark.parametrize("flag", ["normalized", "single_word", "lstrip", "rstrip"])
def test_added_tokens_that_reach_beyond_themselves_are_left_to_the_tokenizer(flag: str) -> None:
    made = Tokenizer.from_str(backend("gpt2").to_str())
    assert WordTokenizer.of(made) is not None
    made.add_tokens([AddedToken("<new>", **{"normalized": False, flag: True})])
    assert WordTokenizer.of(made) is None


def test_a_tokenizer_that_splits_special_tokens_is_left_alone() -> None:
    made = Tokenizer.from_str(backend("gpt2").to_str())
    made.encode_special_tokens = True
    assert WordTokenizer.of(made) is None


def test_nothing_else_is_remembered_than_short_words() -> None:
    tokenizer = WordTokenizer.of(backend("gpt2"))
    assert tokenizer is not None
    tokenizer("word " + "x" * 100)
    assert set(tokenizer._ids) == {"word"}
