"""A tokenizer read without transformers is the one that transformers opens, or it is not read at all."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import UserError
from pegbox_hf.processor import fingerprint
from pegbox_hf.quick import CLASS, CLASSES, MODEL_TYPES, QuickTokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

Compose = Callable[..., Context]
TEXTS = ["The capital of France is Paris.", "<|im_start|>user\n12 + 34<|im_end|>\n", "Naïve wörds 日本 🙂", ""]


def processor(context: Compose, folder: Path, purpose: str = "rows", **hf: object) -> Any:
    ctx = context(folder, hf=hf)
    ctx.purpose = purpose
    return ctx.call(hooks.load_processor, ctx)


def change(path: Path, **changes: object) -> None:
    written = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in written.items() if value != "remove"}))


@pytest.fixture
def published(folder: Path) -> Path:
    """A folder as most models are published: with a post-processor and the class of transformers that takes it so."""
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    loaded.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    loaded.save_pretrained(folder)
    return folder


def added(tokenizer: Any) -> dict[str, dict[str, object]]:
    return {
        str(number): {name: getattr(token, name) for name in ("content", "special", "normalized", "lstrip", "rstrip")}
        | {"single_word": token.single_word}
        for number, token in tokenizer.added_tokens_decoder.items()
    }


VARIANTS: dict[str, Callable[[Path, Any], None]] = {
    "as saved": lambda folder, one: None,
    "older class": lambda folder, one: change(
        folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    ),
    "template in the config": lambda folder, one: (
        (folder / "chat_template.jinja").unlink(),
        change(folder / "tokenizer_config.json", chat_template=one.chat_template),
    ),
    "no template": lambda folder, one: (folder / "chat_template.jinja").unlink(),
    "no padding token": lambda folder, one: change(folder / "tokenizer_config.json", pad_token=None),
    "added tokens twice": lambda folder, one: change(folder / "tokenizer_config.json", added_tokens_decoder=added(one)),
    "tokens as objects": lambda folder, one: change(
        folder / "tokenizer_config.json",
        eos_token={"__type": "AddedToken", "content": "<|im_end|>", "special": True, "normalized": False},
    ),
    "extra tokens": lambda folder, one: change(
        folder / "tokenizer_config.json", additional_special_tokens=["<|im_start|>"]
    ),
    "flags of begin and end": lambda folder, one: change(
        folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True
    ),
    "of an older version": lambda folder, one: change(folder / "config.json", transformers_version="4.40.0"),
}
UNCERTAIN: dict[str, Callable[[Path, Any], None]] = {
    "another class": lambda folder, one: change(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
    "no class": lambda folder, one: change(folder / "tokenizer_config.json", tokenizer_class="remove"),
    "another family": lambda folder, one: change(folder / "config.json", model_type="qwen2"),
    "a token to add": lambda folder, one: change(folder / "tokenizer_config.json", eos_token="<|new|>"),
    "a setting that is not known": lambda folder, one: change(
        folder / "tokenizer_config.json", split_special_tokens=True
    ),
    "a token of its own": lambda folder, one: change(folder / "tokenizer_config.json", image_token="<|im_start|>"),
    "several templates": lambda folder, one: (
        (folder / "chat_template.jinja").unlink(),
        change(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "a"}]),
    ),
    "older special tokens": lambda folder, one: (folder / "special_tokens_map.json").write_text("{}"),
    "no post-processor": lambda folder, one: change(folder / "tokenizer.json", post_processor=None),
    "padding of its own": lambda folder, one: change(
        folder / "tokenizer.json",
        padding={
            "strategy": {"Fixed": 4},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    ),
}


def assert_same(quick: Any, whole: Any) -> None:
    """All that rows, masks and caches read of a tokenizer."""
    assert quick.fingerprint == whole.fingerprint
    assert quick.pad_id == whole.pad_id
    ours, theirs = quick.tokenizer, whole.tokenizer
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert ours.name_or_path == theirs.name_or_path
    assert list(ours.special_tokens_map.items()) == list(theirs.special_tokens_map.items())
    assert {n: repr(t) for n, t in ours.added_tokens_decoder.items()} == {
        n: repr(t) for n, t in theirs.added_tokens_decoder.items()
    }
    for name in ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    for text in TEXTS:
        for special in (False, True):
            encoded = ours.backend_tokenizer.encode(text, add_special_tokens=special).ids
            assert encoded == theirs.backend_tokenizer.encode(text, add_special_tokens=special).ids
            assert encoded == theirs(text, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_tokenizer_that_transformers_opens(
    variant: str, published: Path, tokenizer: Any, context: Any
) -> None:
    VARIANTS[variant](published, tokenizer)
    quick, whole = processor(context, published), processor(context, published, "run")
    assert isinstance(quick.tokenizer, QuickTokenizer)
    assert not isinstance(whole.tokenizer, QuickTokenizer)
    assert type(whole.tokenizer).__name__ == CLASS
    assert_same(quick, whole)
    assert fingerprint(quick.tokenizer.whole()) == quick.fingerprint


@pytest.mark.parametrize("variant", UNCERTAIN)
def test_what_is_not_certain_is_left_to_transformers(
    variant: str, published: Path, tokenizer: Any, context: Any
) -> None:
    UNCERTAIN[variant](published, tokenizer)
    assert not isinstance(processor(context, published).tokenizer, QuickTokenizer)


@pytest.mark.parametrize(
    "hf",
    [
        {"special_tokens": {"pad_token": "<|im_end|>"}},
        {"new_tokens": ["<|new|>"]},
        {"config_overrides": {"max_position_embeddings": 64}},
    ],
)
def test_what_the_config_changes_is_left_to_transformers(hf: dict, published: Path, context: Any) -> None:
    assert not isinstance(processor(context, published, **hf).tokenizer, QuickTokenizer)


def test_a_run_that_loads_a_model_has_the_tokenizer_of_transformers(published: Path, context: Any) -> None:
    ctx = context(published)
    assert type(ctx.call(hooks.load_processor, ctx).tokenizer).__name__ == CLASS


def test_what_rows_do_not_need_is_asked_of_transformers(published: Path, tokenizer: Any, context: Any) -> None:
    quick = processor(context, published).tokenizer
    messages = [{"role": "user", "content": "Paris 12"}]
    assert quick("Paris 12")["input_ids"] == tokenizer("Paris 12")["input_ids"]
    assert quick.apply_chat_template(messages, tokenize=False) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )


def test_the_errors_are_those_of_the_whole_way(published: Path, context: Any) -> None:
    (published / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="does not open"):
        processor(context, published)


def test_too_few_embeddings_are_refused(published: Path, context: Any) -> None:
    change(published / "config.json", vocab_size=100)
    with pytest.raises(UserError, match="but the model has 100 embeddings"):
        processor(context, published)


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_opens_these_families_with_the_class_that_is_named(name: str, published: Path) -> None:
    change(published / "tokenizer_config.json", tokenizer_class=name)
    for kind in sorted(MODEL_TYPES):
        (published / "config.json").write_text(json.dumps({"model_type": kind, "transformers_version": "5.0.0"}))
        assert type(AutoTokenizer.from_pretrained(published)).__name__ == CLASS, kind
        assert kind not in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_rows_are_made_without_torch(published: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name: {published}}}\nplugins: [hf]\noutput: {tmp_path / 'run'}\n")
    script = (
        "import sys\nfrom pegbox import hooks\nfrom pegbox.plan import compose\n"
        f"ctx = compose({str(config)!r})\nctx.purpose = 'rows'\nctx.call(hooks.load_processor, ctx)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
