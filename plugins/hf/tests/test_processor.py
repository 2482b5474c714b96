"""The tokenizer of a run: which one, its pad id, its fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import UserError
from pegbox_hf.processor import fingerprint, pad_id
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Compose = Callable[..., Context]


def tokenizer_with(special: list[str], **roles: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"word": 0}, unk_token="word"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"bos_token": None, "eos_token": None, **roles})


@pytest.mark.parametrize(
    ("special", "roles", "expected"),
    [
        (["<end>", "<mine>"], {"eos_token": "<end>", "pad_token": "<mine>"}, "<mine>"),
        (["<end>"], {"eos_token": "<end>", "pad_token": "<end>"}, "<end>"),
        (["<|eot_id|>", "<|finetune_right_pad_id|>"], {"eos_token": "<|eot_id|>"}, "<|finetune_right_pad_id|>"),
        (["<|reserved_special_token_0|>", "<|eot_id|>"], {"eos_token": "<|eot_id|>"}, "<|reserved_special_token_0|>"),
        (["</s>", "<unused0>", "[PAD]"], {"eos_token": "</s>"}, "[PAD]"),
        (["<|pad|>", "<s>"], {"eos_token": "<|pad|>"}, "<|pad|>"),
        (["</s>", "<|python_tag|>"], {"eos_token": "</s>"}, "</s>"),
    ],
)
def test_pad_id_is_the_pad_token_or_a_reserved_one_or_the_end(special: list[str], roles: dict, expected: str) -> None:
    tokenizer = tokenizer_with(special, **roles)
    before = tokenizer.pad_token
    assert pad_id(tokenizer) == tokenizer.convert_tokens_to_ids(expected)
    assert tokenizer.pad_token == before


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    with pytest.raises(UserError, match="no pad token"):
        pad_id(tokenizer_with([]))


def test_the_models_own_tokenizer_is_loaded(folder: Path, context: Compose, tokenizer: PreTrainedTokenizerFast) -> None:
    ctx = context(folder)
    processor = ctx.call(hooks.load_processor, ctx)
    assert processor.tokenizer("Paris 12").input_ids == tokenizer("Paris 12").input_ids
    assert processor.tokenizer.chat_template == tokenizer.chat_template
    assert processor.pad_id == tokenizer.pad_token_id


def test_fingerprint_changes_with_everything_that_changes_ids(folder: Path, context: Compose) -> None:
    def load() -> PreTrainedTokenizerFast:
        ctx = context(folder)
        return ctx.call(hooks.load_processor, ctx).tokenizer

    same, again, template, added, special = (load() for _ in range(5))
    template.chat_template += " "
    added.add_tokens(["brandnew"])
    special.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert fingerprint(same) == fingerprint(again)
    assert len({fingerprint(t) for t in (same, template, added, special)}) == 4


def test_using_the_tokenizer_does_not_change_its_fingerprint(folder: Path, context: Compose) -> None:
    ctx = context(folder)
    processor = ctx.call(hooks.load_processor, ctx)
    processor.tokenizer(["Paris", "Rome is a capital"], padding=True, truncation=True, max_length=3)
    assert fingerprint(processor.tokenizer) == processor.fingerprint


def test_another_tokenizer_can_be_named(folder: Path, tmp_path: Path, context: Compose) -> None:
    other = tokenizer_with(["<end>"], eos_token="<end>")
    other.save_pretrained(tmp_path / "other")
    ctx = context(folder, hf={"tokenizer": str(tmp_path / "other")})
    assert ctx.call(hooks.load_processor, ctx).tokenizer.eos_token == "<end>"


def test_a_tokenizer_folder_that_does_not_exist_is_refused(folder: Path, context: Compose) -> None:
    ctx = context(folder, hf={"tokenizer": "./not-here"})
    with pytest.raises(UserError, match=r"hf\.tokenizer is '\./not-here'"):
        ctx.call(hooks.load_processor, ctx)


def test_a_folder_without_tokenizer_is_refused(folder: Path, context: Compose) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    ctx = context(folder)
    with pytest.raises(UserError, match="holds no tokenizer") as raised:
        ctx.call(hooks.load_processor, ctx)
    assert "hf.tokenizer" in raised.value.next


def test_a_broken_tokenizer_is_an_error_without_a_trace(folder: Path, context: Compose) -> None:
    (folder / "tokenizer.json").write_text("{}")
    ctx = context(folder)
    with pytest.raises(UserError, match="does not open"):
        ctx.call(hooks.load_processor, ctx)


def test_a_tokenizer_larger_than_the_model_is_refused(
    folder: Path, context: Compose, tiny: Callable[..., PreTrainedModel]
) -> None:
    tiny("Llama", vocab_size=100).save_pretrained(folder)
    ctx = context(folder)
    with pytest.raises(UserError, match="but the model has 100 embeddings"):
        ctx.call(hooks.load_processor, ctx)
