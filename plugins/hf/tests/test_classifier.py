"""Classifying models: their heads, their values, what is exported, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.types import ExportRequest, Model, ModelOptions, ModelRequest
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

Compose = Callable[..., Context]
VALUES = frozenset({"values"})
SEQUENCE, TOKENS = ModelOptions(classify="sequence", labels=1), ModelOptions(classify="token", labels=2)
OPENED_BY = {"sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
PAD = 0
ROWS = [[5, 9, 12, 4, 8], [7, 3], [11, 6, 10]]


class Adapters:
    """Owns apply_adapters, as a plugin that adds adapters does."""

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        return model


def load(ctx: Context, options: ModelOptions, **request: object) -> Model:
    asked = ModelRequest(name=ctx.config.run.model.name, format="transformers", options=options, **request)
    return ctx.call(hooks.load_model, ctx, asked)


def padded(rows: list[list[int]]) -> Batch:
    width = max(map(len, rows))
    ids_BT = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    last_D = torch.tensor([at * width + len(row) - 1 for at, row in enumerate(rows)])
    none = torch.zeros(0, dtype=torch.int64)
    targets_BT = torch.full_like(ids_BT, -100)
    return Batch(input_ids_BT=ids_BT, targets_BT=targets_BT, trained_N=none, attention_mask_BT=mask_BT, last_D=last_D)


def packed(rows: list[list[int]]) -> Batch:
    lengths = [len(row) for row in rows]
    ends = torch.tensor(lengths).cumsum(0)
    return replace(
        padded([[token for row in rows for token in row]]),
        attention_mask_BT=None,
        position_ids_BT=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seqlens_S=torch.tensor([0, *ends.tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        last_D=ends - 1,
    )


def values_at_ends(model: Model, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model.compute(model.module.eval(), batch, VALUES).values_BTC.flatten(0, 1)[batch.last_D]


def exported(ctx: Context, model: Model, folder: Path) -> Path:
    from types import SimpleNamespace

    ctx.runtime = SimpleNamespace(rank=0)
    if "processor" not in vars(ctx):
        ctx.processor = ctx.call(hooks.load_processor, ctx)
    folder.mkdir()
    return ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=folder, format="transformers"))


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Qwen2", "Mistral", "GPT2", "Gemma", "Gemma2", "Phi3"])
@pytest.mark.parametrize("options", [SEQUENCE, TOKENS], ids=["sequence", "token"])
def test_values_are_what_transformers_predicts(
    family: str,
    options: ModelOptions,
    tiny: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    context: Compose,
) -> None:
    """At the last tokens of padded and packed rows, as the exported folder gives them, padded on either side."""
    tiny(family).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    ctx = context(tmp_path / "m", hf={"attention": "eager"})
    model = load(ctx, options)
    ours = values_at_ends(model, padded(ROWS))
    assert ours.dtype == torch.float32
    assert ours.std() > 1e-4
    torch.testing.assert_close(values_at_ends(model, packed(ROWS)), ours, rtol=1e-4, atol=1e-6)
    opened = OPENED_BY[options.classify].from_pretrained(exported(ctx, model, tmp_path / "out")).eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for side in ("right", "left"):
        theirs.padding_side = side
        inputs = theirs.pad({"input_ids": ROWS}, return_tensors="pt")
        if family == "GPT2":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = opened(**{key: value for key, value in inputs.items() if key != "token_type_ids"}).logits
        if options.classify == "token":
            lengths = torch.tensor([len(row) for row in ROWS])
            logits = logits[range(len(ROWS)), lengths - 1 if side == "right" else -1]
        torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-6, msg=side)


def test_a_new_head_depends_on_the_seed_alone(folder: Path, context: Compose) -> None:
    heads = []
    for seed, noise in ((0, 1), (0, 2), (9, 1)):
        torch.manual_seed(noise)
        heads.append(load(context(folder, seed=seed), SEQUENCE).module.score.weight)
        assert torch.initial_seed() == noise
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.01 < heads[0].std().item() < 0.03


def test_a_head_that_is_stored_is_kept(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder)
    model = load(ctx, SEQUENCE)
    with torch.no_grad():
        model.module.score.weight.add_(1.0)
    out = exported(ctx, model, tmp_path / "out")
    for role in ("policy", "reward"):
        again = load(context(out, seed=5), SEQUENCE, role=role)
        assert torch.equal(again.module.score.weight, model.module.score.weight)
        assert any(p.requires_grad for p in again.module.parameters()) == (role == "policy")


def test_a_second_model_without_a_trained_head_is_refused(folder: Path, context: Compose) -> None:
    with pytest.raises(UserError, match=r"has no head that was trained: it lacks score\.weight"):
        load(context(folder), SEQUENCE, role="reward")


def test_other_missing_weights_stay_an_error(folder: Path, context: Compose) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 parameters: model\.norm\.weight"):
        load(context(folder), SEQUENCE)


def test_a_head_of_another_size_is_refused(folder: Path, tmp_path: Path, context: Compose) -> None:
    ctx = context(folder)
    out = exported(ctx, load(ctx, ModelOptions(classify="sequence", labels=3)), tmp_path / "out")
    with pytest.raises(UserError, match="predicts 3 numbers, and 1 are asked for"):
        load(context(out), SEQUENCE)


@pytest.mark.parametrize("labels", [None, 0])
def test_a_head_without_labels_is_refused(labels: int | None, folder: Path, context: Compose) -> None:
    with pytest.raises(UserError, match=f"a classifying head of {labels} labels is asked for"):
        load(context(folder), ModelOptions(classify="token", labels=labels))


def test_a_type_without_such_a_class_is_refused(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    tiny("Cohere").save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="transformers has no SequenceClassification for the model type 'cohere'"):
        load(context(tmp_path / "m"), SEQUENCE)


@pytest.mark.parametrize("need", ["logps", "logits", "entropy"])
def test_what_predicts_numbers_has_no_tokens_to_give(need: str, folder: Path, context: Compose) -> None:
    model = load(context(folder), SEQUENCE)
    with pytest.raises(RunError, match=f"the loss needs {need}, which a classifying model does not return"):
        model.compute(model.module, padded(ROWS), frozenset({need}))


def test_a_language_model_has_no_values(folder: Path, context: Compose) -> None:
    model = load(context(folder), ModelOptions())
    with pytest.raises(RunError, match="the loss needs values, which a causal language model does not return"):
        model.compute(model.module, padded(ROWS), VALUES)


def test_it_says_that_it_classifies(folder: Path, context: Compose) -> None:
    assert "classifier" in load(context(folder), SEQUENCE).traits
    assert {"classifier", "token_classifier"} <= load(context(folder), TOKENS).traits
    assert not load(context(folder), ModelOptions()).traits & {"classifier", "token_classifier"}


def test_tied_embeddings_are_no_head(
    tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path, context: Compose
) -> None:
    tiny("Llama", tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert "tied_head" not in load(context(tmp_path / "m"), SEQUENCE).traits


def test_its_shape_is_known_without_weights(folder: Path, context: Compose) -> None:
    full = load(context(folder), TOKENS).module
    (folder / "model.safetensors").unlink()
    for request in ({"meta": True}, {}):
        options = TOKENS if request else replace(TOKENS, empty=True)
        shape = load(context(folder), options, **request).module
        assert {p.device.type for p in shape.parameters()} == {"meta"}
        assert [(n, p.shape, p.dtype) for n, p in shape.named_parameters()] == [
            (n, p.shape, p.dtype) for n, p in full.named_parameters()
        ]


def test_the_head_computes_in_float32_on_a_half_precision_base(folder: Path, context: Compose) -> None:
    ctx = compose(
        {"model": {"name": str(folder), "dtype": "bfloat16"}, "plugins": ["hf", "adapters"]},
        instances={"adapters": Adapters()},
    )
    model, batch = load(ctx, SEQUENCE), padded(ROWS)
    assert model.module.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = values_at_ends(model, batch)
        with torch.no_grad():
            hidden_BTH = model.compute(model.module, batch, frozenset({"hidden"})).hidden_BTH
    expected = hidden_BTH.float().flatten(0, 1)[batch.last_D] @ model.module.score.weight.T
    assert model.module.score.weight.dtype == values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-7)


def test_every_parameter_gets_a_gradient_and_a_row_without_documents_none(folder: Path, context: Compose) -> None:
    model, batch = load(context(folder), SEQUENCE), padded(ROWS)
    model.compute(model.module, batch, VALUES).values_BTC.flatten()[batch.last_D].sum().backward()
    assert all(bool(p.grad.any()) for p in model.module.parameters())
    model.module.zero_grad(set_to_none=False)
    model.compute(model.module, batch, VALUES).values_BTC.flatten()[batch.last_D[:0]].sum().backward()
    assert not any(bool(p.grad.any()) for p in model.module.parameters())


def test_nothing_is_dropped_before_the_head_unless_the_config_says_so(folder: Path, context: Compose) -> None:
    model, batch = load(context(folder), TOKENS), padded(ROWS)
    model.module.train()
    one, two = (model.compute(model.module, batch, VALUES).values_BTC for _ in range(2))
    assert torch.equal(one, two)
    assert model.module.config.classifier_dropout == 0.0


def test_config_and_tokenizer_name_what_pads(
    folder: Path, tmp_path: Path, context: Compose, tokenizer: PreTrainedTokenizerFast
) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    bare.save_pretrained(folder)
    ctx = context(folder)
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    out = exported(ctx, load(ctx, SEQUENCE), tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out)
    opened = AutoModelForSequenceClassification.from_pretrained(out)
    assert opened.config.pad_token_id == theirs.pad_token_id == ctx.processor.pad_id == PAD


def test_an_adapter_with_a_head_opens_as_a_reward_model(folder: Path, tmp_path: Path, context: Compose) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    base.config.pad_token_id = PAD
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = load(context(tmp_path / "adapter"), SEQUENCE, role="reward")
    with torch.no_grad():
        expected = adapted(input_ids=padded(ROWS).input_ids_BT, attention_mask=padded(ROWS).attention_mask_BT).logits
    torch.testing.assert_close(values_at_ends(model, padded(ROWS)), expected, rtol=1e-5, atol=1e-6)


def test_an_adapter_without_a_head_is_no_reward_model(folder: Path, tmp_path: Path, context: Compose) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="has no head that was trained"):
        load(context(tmp_path / "adapter"), SEQUENCE, role="reward")


def test_the_text_part_alone_is_not_opened_with_a_classifying_head(
    tiny: Callable[..., PreTrainedModel], tmp_path: Path, context: Compose
) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    seen = {**text, "image_size": 16, "patch_size": 8}
    config = Gemma3Config(text_config={**text, "vocab_size": 320, "head_dim": 8}, vision_config=seen)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=r"hf\.text_only is set, and .* with a classifying head"):
        load(context(tmp_path / "m", hf={"text_only": True}), SEQUENCE)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_head_of_a_quantized_base_is_not_quantized(bits: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    asked = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    ctx = compose({"model": {"name": str(folder)}, "plugins": ["hf", "adapters"]}, instances={"adapters": Adapters()})
    model = load(ctx, replace(SEQUENCE, quantization=asked))
    assert type(model.module.score) is torch.nn.Linear
    assert model.module.score.weight.dtype == torch.float32
    assert type(model.module.model.layers[0].mlp.up_proj).__name__.startswith("Linear" + str(bits))
    assert asked.llm_int8_skip_modules is None
    assert values_at_ends(model, padded(ROWS)).isfinite().all()
