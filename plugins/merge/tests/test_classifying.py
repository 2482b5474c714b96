"""Reward models trained with adapters, merged: the folder opens as a classifier and predicts what PEFT's does."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported_runs import change, record, trained
from pegbox.errors import RunError, UserError
from pegbox_merge.command import merge
from pegbox_merge.fidelity import check
from pegbox_merge.merging import Merged, MergeRequest, write_merged
from pegbox_merge.runs import Trained, open_run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

OPENS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}
QV = ["q_proj", "v_proj"]
TEXTS = ["a short one", "a longer text than the first", "x"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "outcome": ("llama", {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "outcome, tied base": ("tied", {"task_type": "SEQ_CLS", "target_modules": QV}),
    "outcome, dora": ("llama", {"task_type": "SEQ_CLS", "target_modules": QV, "use_dora": True}),
    "outcome, experts": (
        "qwen3-moe",
        {"task_type": "SEQ_CLS", "target_modules": QV, "target_parameters": ["mlp.experts.down_proj"]},
    ),
    "process": ("llama", {"task_type": "TOKEN_CLS", "target_modules": QV, "labels": 2}),
    "process, GPT-2": ("gpt2", {"task_type": "TOKEN_CLS", "target_modules": ["c_attn"], "labels": 3}),
}


def padded_scores(model: Any, folder: Path, side: str = "right") -> torch.Tensor:
    """What a plain transformers model says of padded texts, where there is a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return logits if logits.ndim == 2 else logits[inputs["attention_mask"].bool()]


def by_peft(base: Path, run: Path, task: str, labels: int) -> Any:
    model = OPENS[task].from_pretrained(base, num_labels=labels)
    wrapped = peft.PeftModel.from_pretrained(model, run)
    wrapped.config.pad_token_id = AutoTokenizer.from_pretrained(run).pad_token_id
    return wrapped


def opened(folder: Path, task: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = OPENS[task].from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_padded_predictions_equal_those_of_peft(
    kind: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    name, settings = KINDS[kind]
    base, task, labels = bases(name), settings["task_type"], settings.get("labels", 1)
    run = adapter_on(base, **settings)
    origin = open_run(run)
    done = write_merged(origin, MergeRequest(tmp_path / "merged"))
    made = opened(done.folder, task)
    wrapped = by_peft(base, run, task, labels)
    for side in ("right", "left"):
        theirs, ours = padded_scores(wrapped, run, side), padded_scores(made, done.folder, side)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert theirs.std() > 1e-3
    expected = wrapped.merge_and_unload().state_dict()
    assert made.state_dict().keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(made.state_dict()[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    assert (made.config.num_labels, type(made).__name__) == (labels, made.config.architectures[0])
    stored = load_file(done.folder / "model.safetensors")
    assert not any("lm_head" in key for key in stored)
    figures = check(origin, done)
    assert figures.error < 1e-4 < 1e-3 < figures.error_base
    assert json.loads((done.folder / "merge.json").read_text())["status"] == "checked"


def test_in_bfloat16_the_head_keeps_its_float32(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    """As PEFT writes it; what opens the folder in bfloat16 rounds it, and the check holds all the same."""
    run = adapter_on(bases("llama", torch.bfloat16), task_type="SEQ_CLS", target_modules="all-linear")
    origin = open_run(run)
    done = write_merged(origin, MergeRequest(tmp_path / "merged"))
    stored = load_file(done.folder / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name != "score.weight"} == {torch.bfloat16}
    head = load_file(run / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(stored["score.weight"], head.float())
    assert check(origin, done).error < 0.05


def test_a_classifier_is_trained_further_and_merged(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    """The base holds a head already: it is replaced, under its own name."""
    first = write_merged(
        open_run(adapter_on(bases("llama"), task_type="SEQ_CLS", target_modules=QV)), MergeRequest(tmp_path / "first")
    )
    run = adapter_on(first.folder, task_type="SEQ_CLS", target_modules=["o_proj"])
    origin = open_run(run)
    done = write_merged(origin, MergeRequest(tmp_path / "second"))
    heads = [load_file(made.folder / "model.safetensors")["score.weight"] for made in (first, done)]
    assert not torch.equal(*heads)
    expected = padded_scores(by_peft(first.folder, run, "SEQ_CLS", 1), run)
    torch.testing.assert_close(
        padded_scores(opened(done.folder, "SEQ_CLS"), done.folder), expected, rtol=1e-4, atol=1e-4
    )
    assert check(origin, done).error < 1e-4


@pytest.mark.parametrize(("plugin", "task"), [("reward", "SEQ_CLS"), ("prm", "TOKEN_CLS")])
def test_a_run_of_a_reward_model_is_merged_and_checked(plugin: str, task: str, bases: Callable, tmp_path: Path) -> None:
    run = trained(bases("llama"), tmp_path / "run", plugins=(plugin,))
    merge(run)
    told = record(run)
    assert told["status"] == "checked"
    assert told["check"]["error"] < 1e-4 < 1e-2 < told["check"]["error_base"]
    labels = 1 if plugin == "reward" else 2
    expected = padded_scores(by_peft(bases("llama"), run, task, labels), run)
    made = opened(run / "merged", task)
    torch.testing.assert_close(padded_scores(made, run / "merged"), expected, rtol=1e-4, atol=1e-4)


Made = tuple[Trained, Merged]


@pytest.fixture
def reward_model(bases: Callable, adapter_on: Callable, tmp_path: Path) -> Made:
    origin = open_run(adapter_on(bases("llama"), task_type="SEQ_CLS", target_modules="all-linear"))
    return origin, write_merged(origin, MergeRequest(tmp_path / "merged"))


def forget_one_adapter(made: Made) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change(made[1].folder, name, lambda _: load_file(made[0].base_files / "model.safetensors")[name])


def forget_all_but_the_head(made: Made) -> None:
    stored, base = (load_file(f / "model.safetensors") for f in (made[1].folder, made[0].base_files))
    kept = {name: base.get(name, tensor) for name, tensor in stored.items()}
    save_file(kept, made[1].folder / "model.safetensors", metadata={"format": "pt"})


def flip_the_head(made: Made) -> None:
    change(made[1].folder, "score.weight", torch.neg)


def forget_the_padding(made: Made) -> None:
    file = made[1].folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 9}))


@pytest.mark.parametrize(
    "damage", [forget_one_adapter, forget_all_but_the_head, flip_the_head, forget_the_padding], ids=lambda f: f.__name__
)
def test_a_damaged_merge_is_caught_and_marked(damage: Callable[[Made], None], reward_model: Made) -> None:
    damage(reward_model)
    with pytest.raises(RunError, match="is not the one that was trained"):
        check(*reward_model)
    assert json.loads((reward_model[1].folder / "merge.json").read_text())["status"] == "failed"


def test_an_adapter_that_lost_its_head_is_refused(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), task_type="SEQ_CLS", target_modules=QV)
    file = run / "adapter_model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if "score" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds no head"):
        open_run(run)
