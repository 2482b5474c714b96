"""Places of tokens by their bytes are those that the tokenizer itself reports."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.types import Processor
from pegbox_data.encoding import Encoder
from pegbox_data.formats import Rendered, Span
from tokenizers import Tokenizer, decoders, models, normalizers

WORDS = [*"ab \n.,xyz", " the", "answer", "ü", "日本", "🙂", "é", "<|im_end|>", "<|im_start|>", "\n\n"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=30).map("".join)


@st.composite
def rows(draw):
    text = draw(TEXTS)
    borders = sorted(
        draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=6).filter(lambda b: len(b) % 2 == 0))
    )
    pairs = list(zip(borders[::2], borders[1::2], strict=True))
    nexts = [*(start for start, _ in pairs[1:]), len(text)]
    return Rendered(text, [Span(a, b, draw(st.integers(b, limit))) for (a, b), limit in zip(pairs, nexts, strict=True)])


@settings(max_examples=400, deadline=None)
@given(row=rows())
def test_masks_by_bytes_are_those_by_the_tokenizers_own_characters(row, chatml):
    processor = Processor(tokenizer=chatml, pad_id=0, fingerprint="")
    fast, slow = Encoder(processor), Encoder(processor)
    assert fast._tiling is not None
    slow._tiling = None
    with fast.session():
        (one,), (other,) = fast.encode([row]), slow.encode([row])
    assert one.ids.tolist() == other.ids.tolist()
    assert one.trained.tolist() == other.trained.tolist()
    assert one.border_tokens == other.border_tokens


def test_rows_that_a_normalizer_changes_are_left_to_the_tokenizer(tokenizer_with):
    tokenizer = tokenizer_with(None)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    encoder = Encoder(Processor(tokenizer=tokenizer, pad_id=0, fingerprint=""))
    decomposed = "e\u0301 answer"
    with encoder.session():
        (encoded,) = encoder.encode([Rendered(decomposed, [Span(2, 9, 9)])])
    assert tokenizer.decode(encoded.ids[encoded.trained]) == " answer"


@pytest.mark.parametrize("decoder", [decoders.Metaspace(), decoders.WordPiece()])
def test_other_vocabularies_have_no_tiling(decoder):
    from pegbox_data.tiling import Tiling

    backend = Tokenizer(models.BPE())
    backend.decoder = decoder
    assert Tiling.of(backend) is None
