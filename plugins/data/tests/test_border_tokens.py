"""A token that reaches over the border of a trained part is not trained, and is counted."""

from __future__ import annotations

import numpy as np
import pytest
from pegbox.types import Processor
from pegbox_data.encoding import Encoder
from pegbox_data.formats import Rendered, Span
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def merging_tokenizer(trim_offsets: bool = False, swallow: bool = False) -> PreTrainedTokenizerFast:
    """Single bytes, the merges `ab` and `\\n\\n`, and `<e>`, which may swallow whitespace after it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "Ċ"
    vocabulary = {token: index for index, token in enumerate([*alphabet, "ab", newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), (newline, newline)]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<e>", special=True, normalized=False, rstrip=swallow)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<e>")


def encode(tokenizer: PreTrainedTokenizerFast, text: str, *spans: tuple[int, int, int]) -> tuple[list[str], int]:
    """The trained tokens, decoded one by one, and how many border tokens were left out."""
    encoder = Encoder(Processor(tokenizer=tokenizer, pad_id=0, fingerprint=""))
    with encoder.session():
        (row,) = encoder.encode([Rendered(text, [Span(*span) for span in spans])])
    return [tokenizer.decode([i]) for i in row.ids[row.trained]], row.border_tokens


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("text", "span", "trained", "outside"),
    [
        ("xyz", (1, 2, 2), ["y"], 0),
        ("xab", (1, 3, 3), ["ab"], 0),
        ("xab", (2, 3, 3), [], 1),
        ("xabz", (2, 4, 4), ["z"], 1),
        ("xaby", (0, 2, 2), ["x"], 1),
        ("\n\nx", (1, 3, 3), ["x"], 1),
        (":\n\n\nx", (2, 5, 5), ["\n", "x"], 1),
        ("a\n b", (2, 4, 4), [" ", "b"], 0),
        ("x", (0, 1, 1), ["x"], 0),
        ("xy", (2, 2, 2), [], 0),
    ],
)
def test_tokens_over_a_border_are_left_out_and_counted(text, span, trained, outside, trim):
    assert encode(merging_tokenizer(trim), text, span) == (trained, outside)


@pytest.mark.parametrize("text", ["🙂é", "日本", "e\u0301x", "🙂"])
def test_all_tokens_of_a_character_are_trained_together(text):
    tokenizer = merging_tokenizer()
    whole = f"<{text}>"
    encoder = Encoder(Processor(tokenizer=tokenizer, pad_id=0, fingerprint=""))
    with encoder.session():
        (row,) = encoder.encode([Rendered(whole, [Span(1, 1 + len(text), 1 + len(text))])])
    assert np.flatnonzero(~row.trained).tolist() == [0, len(row.ids) - 1]


def test_an_end_token_that_swallows_the_newline_after_it_is_trained():
    tokenizer = merging_tokenizer(swallow=True)
    assert encode(tokenizer, "u\na<e>\nu", (2, 6, 7)) == (["a", "<e>"], 0)


def test_neighbouring_parts_do_not_share_tokens():
    assert encode(merging_tokenizer(), "xaby", (0, 2, 2), (2, 4, 4)) == (["x", "y"], 2)


def test_the_tokenizer_is_left_as_it_was():
    tokenizer = merging_tokenizer(trim_offsets=True)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=3)
    tokenizer.backend_tokenizer.enable_truncation(5)
    before = tokenizer.backend_tokenizer.to_str()
    encode(tokenizer, "xabz", (0, 4, 4))
    assert tokenizer.backend_tokenizer.to_str() == before
