"""Whole runs: what is learnt, what is left, and that nothing depends on how rows are laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox.plan import compose
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

Train = Callable[..., Any]
VALUES = frozenset({"values"})
PAIRS = [[150, 120, 5, 7, 9, 258], [150, 120, 55, 258], [101, 60, 61, 62, 63, 258]]
LAST = [len(row) - 1 for row in PAIRS]


def rewards(trained: Any) -> torch.Tensor:
    """Of each row alone, by the run's own forward."""
    from pegbox.rows import Batch

    scores = []
    with torch.no_grad():
        for row in PAIRS:
            ids = torch.tensor([row])
            batch = Batch(input_ids_BT=ids, targets_BT=torch.full_like(ids, -100), trained_N=torch.zeros(0).long())
            scores.append(trained.model.compute(trained.model.module.eval(), batch, VALUES).values_BTC[0, -1])
    return torch.stack(scores)


def scores(model: PreTrainedModel, tokenizer: Any, side: str) -> torch.Tensor:
    tokenizer.padding_side = side
    inputs = tokenizer.pad({"input_ids": PAIRS}, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


def test_the_exported_folder_gives_the_runs_rewards_padded_on_either_side(train: Train) -> None:
    trained = train("run")
    model = AutoModelForSequenceClassification.from_pretrained(trained.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(trained.folder)
    assert model.config.num_labels == 1
    for side in ("right", "left"):
        torch.testing.assert_close(scores(model, tokenizer, side), rewards(trained), rtol=1e-4, atol=1e-5)


def test_the_exported_adapter_gives_the_runs_rewards_in_plain_peft(train: Train, base: Path) -> None:
    trained = train("run", plugins=["lora"], lora={"r": 4})
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    fresh = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    fresh.config.pad_token_id = AutoTokenizer.from_pretrained(trained.folder).pad_token_id
    model = peft.PeftModel.from_pretrained(fresh, trained.folder).eval()
    for side in ("right", "left"):
        expected = rewards(trained)
        torch.testing.assert_close(
            scores(model, AutoTokenizer.from_pretrained(trained.folder), side), expected, rtol=1e-4, atol=1e-5
        )
    assert {name.split(".modules_to_save")[0] for name in trained.weights() if "lora_" not in name} == {"score"}


def test_the_chosen_answers_win_and_health_rules_look_at_what_is_logged(train: Train) -> None:
    trained = train("run", trainer={"max_steps": 30, "eval_at_end": True})
    assert trained.metrics["eval_accuracy"] == 1.0
    assert trained.metrics["eval_margin"] > 0.5
    assert trained.metrics["eval_loss"] < 0.7
    logged = [json.loads(line) for line in (trained.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"} <= logged[0].keys()
    assert all(line["min_reward"] < line["mean_reward"] < line["max_reward"] for line in logged if "min_reward" in line)
    rules = compose({"model": {"name": "tiny"}, "plugins": ["reward"]}).items("health_rule")
    assert {item.target["metric"] for item in rules.values()} <= trained.metrics.keys()
    assert all(name.startswith("reward-") and item.target["source"] for name, item in rules.items())


@pytest.mark.parametrize(
    "laid_out",
    [
        {"trainer": {"micro_batch": 1, "accumulation": 4}},
        {"trainer": {"micro_batch": 2, "accumulation": 2}},
        {"trainer": {"batch": 4, "micro_batch": 3}},
    ],
)
def test_training_does_not_depend_on_the_split(laid_out: dict[str, Any], train: Train) -> None:
    whole, split = train("whole", reward={"center": 0.05}), train("split", reward={"center": 0.05}, **laid_out)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(split.weights()[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_packed_training_equals_padded_training(train: Train) -> None:
    """One bin holds all rows of an epoch, so that both take the same rows in a step."""
    padded = train("padded", trainer={"micro_batch": 12})
    packed = train("packed", plugins=["packing"], packing={"length": 512}, trainer={"micro_batch": 1})
    assert packed.metrics["loss"] == pytest.approx(padded.metrics["loss"], rel=1e-5)
    for name, weight in padded.weights().items():
        torch.testing.assert_close(packed.weights()[name], weight, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("more", [{}, {"plugins": ["lora"], "lora": {"r": 2, "dropout": 0.1}}])
def test_a_stopped_run_goes_on_with_the_same_bits(more: dict[str, Any], train: Train) -> None:
    whole = train("whole", **more)
    train("run", stop=3, **more)
    resumed = train("run", **more)
    for name, weight in whole.weights().items():
        assert torch.equal(resumed.weights()[name], weight), name


def test_rows_that_are_no_pairs_are_refused_before_a_model_is_loaded() -> None:
    from pegbox import hooks
    from pegbox.errors import DataError
    from pegbox.plan import compose
    from pegbox.testing.tiny import TinyExamples, tiny_processor

    class Texts:
        @hooks.hookimpl
        def build_dataset(self) -> TinyExamples:
            return TinyExamples(["one", "two"])

    ctx = compose({"model": {"name": "absent"}, "plugins": ["texts", "reward"]}, instances={"texts": Texts()})
    with pytest.raises(DataError, match=r"(?s)text 0 is no pair.*Give the data the format preference"):
        ctx.call(hooks.build_dataset, ctx, tiny_processor(), "train")
