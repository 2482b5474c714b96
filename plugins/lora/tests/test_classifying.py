"""Adapters on classifying models: the head is trained whole, exported with them, and never forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import UserError
from pegbox.testing.tiny import tiny_model
from pegbox.types import ExportRequest, Model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel

Adapt = Callable[..., tuple[Context, Model]]
IDS = torch.arange(24).reshape(2, 12)
KINDS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, {"classifier"}),
    "TOKEN_CLS": (AutoModelForTokenClassification, {"classifier", "token_classifier"}),
}


def opened(base: Path, task: str = "SEQ_CLS") -> PreTrainedModel:
    torch.manual_seed(11)
    return KINDS[task][0].from_pretrained(base, num_labels=2).eval()


def classifier(base: Path, task: str = "SEQ_CLS") -> Model:
    module, traits = opened(base, task), KINDS[task][1]
    return replace(tiny_model(), module=module, base=str(base), traits=frozenset({"causal", *traits}))


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(IDS).logits


@pytest.mark.parametrize("task", KINDS)
def test_the_head_is_trained_whole_and_the_export_opens_in_plain_peft(
    task: str, adapt: Adapt, base: Path, tmp_path: Path
) -> None:
    ctx, model = adapt(classifier(base, task), r=4)
    trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
    head = {name for name in trained if "lora_" not in name}
    assert head
    assert all(name.startswith("score.modules_to_save.default.") for name in head)
    assert not any(name.startswith("score") and "lora_" in name for name in trained)
    assert "model.layers.1.mlp.down_proj.lora_B.default.weight" in trained
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == (task, ["score"])
    again = peft.PeftModel.from_pretrained(opened(base, task), tmp_path / "out")
    assert type(again).__name__ == {"SEQ_CLS": "PeftModelForSequenceClassification"}.get(
        task, "PeftModelForTokenClassification"
    )
    torch.testing.assert_close(logits(again), logits(model.module), rtol=0, atol=0)
    assert not torch.allclose(logits(opened(base, task)), logits(model.module), atol=1e-3)


def test_modules_that_are_named_are_saved_beside_the_head(adapt: Adapt, base: Path) -> None:
    for named in (["norm"], ["norm", "score"]):
        _, model = adapt(classifier(base), targets=["q_proj"], modules_to_save=named)
        assert sorted(model.module.peft_config["default"].modules_to_save) == ["model.norm", "score"]


def test_an_adapter_with_its_head_is_trained_further(adapt: Adapt, base: Path, tmp_path: Path) -> None:
    ctx, model = adapt(classifier(base), r=4)
    (tmp_path / "first").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "first", format="peft"))
    _, again = adapt(classifier(base), moved=False, adapter=str(tmp_path / "first"))
    torch.testing.assert_close(logits(again.module), logits(model.module), rtol=0, atol=0)
    assert all(p.requires_grad for p in again.module.score.modules_to_save.parameters())


def test_an_adapter_of_a_language_model_does_not_hold_the_head(adapt: Adapt, base: Path, tmp_path: Path) -> None:
    ctx, model = adapt(replace(tiny_model(), base=str(base)), r=4, targets=["q_proj"])
    (tmp_path / "first").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "first", format="peft"))
    with pytest.raises(UserError, match="the adapter does not hold the head of tiny, 'score'"):
        adapt(classifier(base), adapter=str(tmp_path / "first"))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_beginnings_that_need_a_language_model_are_refused(init: str, adapt: Adapt, base: Path) -> None:
    with pytest.raises(UserError, match=rf"lora\.init is '{init}', and tiny classifies"):
        adapt(classifier(base), init=init)
