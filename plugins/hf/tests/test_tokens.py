"""Special tokens by name, new tokens, and the embeddings that new tokens need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, RunError
from pegbox.plan import compose, plan_model
from pegbox.types import ExportRequest, Model, ModelOptions, ModelRequest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

Compose = Callable[..., Context]
FIRST = 319
"""Tokens of the tokenizer: the model has one row more, so the first new token begins in a row that exists."""
IDS = [FIRST, FIRST + 1]
PROMPT = torch.tensor([[5, FIRST, 7, FIRST + 1]])
NEW = {"new_tokens": ["<tool>", {"text": "<|call|>", "special": True, "like": "The capital of France"}]}


def load(ctx: Context, role: str = "policy") -> Model:
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1)
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    request = ModelRequest(
        name=ctx.config.run.model.name, format="transformers", role=role, options=ModelOptions(dtype="float32")
    )
    return ctx.call(hooks.load_model, ctx, request)


def adapted(folder: Path, tmp_path: Path, lora: dict[str, Any], **hf: Any) -> tuple[Context, Model]:
    config = {"model": {"name": str(folder)}, "plugins": ["hf", "lora"], "hf": hf, "lora": lora}
    ctx = compose({**config, "output": str(tmp_path / "run")})
    model = ctx.call(hooks.apply_adapters, ctx, load(ctx))
    ctx.each(hooks.patch_modules, ctx, model, "adapted")
    return ctx, model


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_special_tokens_take_the_parts_that_the_config_gives(folder: Path, context: Compose) -> None:
    ctx = context(folder, hf={"special_tokens": {"pad_token": "<|im_end|>", "eos_token": "<|pad|>"}})
    model, tokenizer = load(ctx), ctx.processor.tokenizer
    assert ctx.processor.pad_id == tokenizer.pad_token_id == 2
    assert tokenizer.eos_token_id == model.module.config.eos_token_id == 0
    assert model.module.generation_config.eos_token_id == [0, 2], "the end tokens it had still end answers"
    assert model.module.generation_config.pad_token_id == 2


def test_a_choice_of_ours_is_logged(
    folder: Path, context: Compose, caplog: pytest.LogCaptureFixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    caplog.set_level("INFO", logger="pegbox")
    ctx = context(folder)
    ctx.call(hooks.load_processor, ctx)
    assert caplog.text == "", "the tokenizer's own pad token is no choice"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = ctx.call(hooks.load_processor, ctx)
    assert processor.tokenizer.pad_token is None
    assert f"padded with {processor.tokenizer.convert_ids_to_tokens(processor.pad_id)!r}" in caplog.text


@pytest.mark.parametrize(
    ("hf", "says"),
    [
        ({"special_tokens": {"pad_token": "<none>"}}, "which the tokenizer does not have"),
        ({"new_tokens": ["<|im_end|>"]}, "which is not new: its id is 2"),
        ({"new_tokens": ["<a>", {"text": "<a>"}]}, "it is in the list twice"),
    ],
)
def test_tokens_that_cannot_be_are_refused(hf: dict, says: str, folder: Path, context: Compose) -> None:
    ctx = context(folder, hf=hf)
    with pytest.raises(ConfigError, match=says) as raised:
        ctx.call(hooks.load_processor, ctx)
    assert raised.value.next


def test_new_tokens_are_one_id_each_and_special_ones_are_left_out_of_answers(folder: Path, context: Compose) -> None:
    ctx = context(folder, hf=NEW)
    tokenizer = ctx.call(hooks.load_processor, ctx).tokenizer
    ids = tokenizer("Rome<tool>Rome<|call|>")["input_ids"]
    assert [token_id for token_id in ids if token_id >= FIRST] == IDS
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Rome<tool>Rome"
    plain = context(folder)
    assert plain.call(hooks.load_processor, plain).fingerprint != ctx.call(hooks.load_processor, ctx).fingerprint


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_begin_as_asked_and_old_rows_stay(
    tied: bool,
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    context: Compose,
) -> None:
    before = tiny("Llama", tie_word_embeddings=tied)
    ctx = context(saved(before, tokenizer, tmp_path / "m"), hf={**NEW, "embedding_multiple": 64})
    module = load(ctx).module
    pieces = tokenizer("The capital of France")["input_ids"]
    pairs = [(module.get_input_embeddings(), before.get_input_embeddings())]
    pairs += [(module.get_output_embeddings(), before.get_output_embeddings())]
    for new, old in pairs:
        assert new.weight.shape == (384, 32)
        assert torch.equal(new.weight[:FIRST], old.weight[:FIRST])
        torch.testing.assert_close(new.weight[FIRST], old.weight[:FIRST].mean(0))
        torch.testing.assert_close(new.weight[FIRST + 1], old.weight[pieces].mean(0))
        torch.testing.assert_close(new.weight[383], old.weight[:FIRST].mean(0))
    assert (module.get_input_embeddings().weight is module.get_output_embeddings().weight) == tied
    assert module.config.vocab_size == 384


@pytest.mark.parametrize("idle", [{"embedding_multiple": 64}, {"new_embeddings": "sampled"}])
def test_settings_of_new_tokens_without_any_are_refused(idle: dict[str, object], context: Compose) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(idle))} is set, but new_tokens adds none"):
        context("tiny", hf=idle)


def test_sampled_rows_have_the_spread_of_old_ones_and_depend_on_the_seed_alone(folder: Path, context: Compose) -> None:
    names = [f"<new{number}>" for number in range(400)]
    settings = {"new_tokens": names, "new_embeddings": "sampled"}
    one, two = (load(context(folder, hf=settings)).module.get_input_embeddings().weight for _ in range(2))
    other = load(context(folder, hf=settings, seed=9)).module.get_input_embeddings().weight
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    old, new = one[:FIRST], one[FIRST : FIRST + 400]
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(new.std(0).mean(), old.std(0).mean(), rtol=0.1, atol=0)


def test_old_tokens_keep_their_probabilities_among_themselves(folder: Path, context: Compose) -> None:
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        before = load(context(folder)).module(input_ids=ids).logits[..., :FIRST]
        after = load(context(folder, hf=NEW)).module(input_ids=ids).logits[..., :FIRST]
    torch.testing.assert_close(after, before)


def test_a_plan_without_weights_knows_the_new_rows(folder: Path, context: Compose) -> None:
    plain, grown = plan_model(context(folder)).model, plan_model(context(folder, hf=NEW)).model
    assert grown["parameters"] - plain["parameters"] == 2 * 1 * 32


def test_full_fine_tuning_exports_the_new_rows(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder, hf=NEW)
    model = load(ctx)
    with torch.no_grad():
        model.module.get_input_embeddings().weight[FIRST:] += 1
    ctx.each(hooks.patch_modules, ctx, model, "adapted")
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="transformers"))
    opened, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    ids = tokenizer("Rome<tool><|call|>", return_tensors="pt").input_ids
    assert ids[0, -2:].tolist() == IDS
    torch.testing.assert_close(opened(ids).logits, model.module(ids).logits)


def test_new_tokens_that_an_adapter_leaves_untrained_stop_the_run(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"rows of model\.embed_tokens, lm_head are not trained") as raised:
        adapted(folder, tmp_path, {"r": 2}, **NEW)
    assert "modules_to_save: [embed_tokens, lm_head]" in raised.value.next
    with pytest.raises(RunError, match=r"rows of lm_head are not trained"):
        adapted(folder, tmp_path, {"r": 2, "modules_to_save": ["embed_tokens"]}, **NEW)


def test_token_by_token_training_must_name_every_new_token(folder: Path, context: Compose) -> None:
    for indices, trained in ((IDS, True), (IDS[:1], False)):
        ctx = context(folder, hf=NEW, plugins=["hf", "lora"])
        model = load(ctx)
        both = {"embed_tokens": indices, "lm_head": indices}
        config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=both)
        peft.inject_adapter_in_model(config, model.module, "default")
        if trained:
            ctx.each(hooks.patch_modules, ctx, model, "adapted")
        else:
            with pytest.raises(RunError, match="are not trained"):
                ctx.each(hooks.patch_modules, ctx, model, "adapted")


def test_the_adapter_may_train_the_new_tokens_alone(folder: Path, tmp_path: Path, context: Compose) -> None:
    lora = {"r": 2, "tokens": ["<tool>", "<|call|>"], "token_modules": ["embed_tokens", "lm_head"]}
    ctx, model = adapted(folder, tmp_path, lora, **NEW)
    move(model.module)
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    opened = load(context(tmp_path / "out"), role="reference").module
    with torch.no_grad():
        torch.testing.assert_close(opened(PROMPT).logits, model.module.eval()(PROMPT).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_whole_embeddings_opens_for_reading(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx, model = adapted(folder, tmp_path, {"r": 2, "modules_to_save": ["embed_tokens", "lm_head"]}, **NEW)
    move(model.module)
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    opened = load(context(tmp_path / "out"), role="reference").module
    with torch.no_grad():
        torch.testing.assert_close(opened(PROMPT).logits, model.module.eval()(PROMPT).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_whole_embeddings_and_a_tied_head_opens_for_reading(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context: Compose
) -> None:
    base = saved(tiny("Llama", tie_word_embeddings=True), tokenizer, tmp_path / "base")
    ctx, model = adapted(base, tmp_path, {"r": 2, "modules_to_save": ["embed_tokens"]}, **NEW)
    move(model.module)
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    opened = load(context(tmp_path / "out"), role="reference").module
    with torch.no_grad():
        torch.testing.assert_close(opened(PROMPT).logits, model.module.eval()(PROMPT).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_with_single_tokens_on_a_tied_head_opens_for_reading(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context: Compose
) -> None:
    base = saved(tiny("Llama", tie_word_embeddings=True), tokenizer, tmp_path / "base")
    ctx = context(base, hf=NEW)
    model = load(ctx)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=IDS)
    wrapped = peft.get_peft_model(model.module, config)
    move(wrapped)
    wrapped.save_pretrained(tmp_path / "out", save_embedding_layers=False)
    ctx.processor.tokenizer.save_pretrained(tmp_path / "out")
    opened = load(context(tmp_path / "out"), role="reference").module
    with torch.no_grad():
        torch.testing.assert_close(opened(PROMPT).logits, wrapped.eval()(PROMPT).logits, rtol=1e-4, atol=1e-5)


def move(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
