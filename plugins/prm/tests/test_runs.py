"""Whole runs: they equal transformers' trainer on a token classifier, and nothing depends on how rows are laid out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Batch
from tiny_steps import SEPARATOR, Steps
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

Train = Callable[..., Any]
VALUES = frozenset({"values"})


def rows(split: str = "train", count: int = 12) -> list[dict[str, list[int]]]:
    """The rows as TRL's PRM trainer wrote them: the verdict of a step stands at its separator."""
    made = []
    for example in (Steps(split, count)[at] for at in range(count)):
        verdicts = iter(example.columns["labels"])
        labels = [int(next(verdicts)) if token == SEPARATOR else UNTRAINED for token in example.input_ids]
        made.append({"input_ids": list(example.input_ids), "labels": labels})
    return made


def same_start(base: Path, folder: Path) -> PreTrainedModel:
    """transformers' token classifier with the head that a run begins with."""
    from pegbox import hooks
    from pegbox.types import ModelOptions, ModelRequest

    ctx = compose({"model": {"name": str(base)}, "plugins": ["hf"], "output": str(folder)})
    request = ModelRequest(name=str(base), format="transformers", options=ModelOptions(classify="token", labels=2))
    loaded = ctx.call(hooks.load_model, ctx, request).module
    config = AutoConfig.from_pretrained(base, num_labels=2)
    config.classifier_dropout = 0.0
    model = AutoModelForTokenClassification.from_pretrained(base, config=config)
    model.load_state_dict(loaded.state_dict())
    return model


def test_weights_and_loss_equal_transformers_trainer(train: Train, base: Path, tmp_path: Path) -> None:
    """Full batches without shuffling: the mean over a step's marks, at the separators, with AdamW."""
    ours = train("ours", trainer={"micro_batch": 12, "max_steps": 4, "log_every": 1, "max_grad_norm": None})
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=12,
        max_steps=4,
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        lr_scheduler_type="linear",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
    )
    model, tokenizer = same_start(base, tmp_path / "start"), AutoTokenizer.from_pretrained(base)
    collator = DataCollatorForTokenClassification(tokenizer)
    theirs = Trainer(model=model, args=arguments, train_dataset=Dataset.from_list(rows()), data_collator=collator)
    theirs.train()
    logged = [json.loads(line) for line in (ours.folder / "metrics.jsonl").read_text().splitlines()]
    mine = [line["loss"] for line in logged if line["kind"] == "train"]
    their = [line["loss"] for line in theirs.state.log_history if "loss" in line]
    assert mine == pytest.approx(their, rel=1e-5)
    for name, weight in ours.weights().items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=1e-4, atol=2e-5, msg=name)


def test_loss_gradients_and_accuracy_equal_transformers(base: Path, tmp_path: Path) -> None:
    from pegbox.rows import Extra
    from pegbox.types import Outputs
    from pegbox_prm.loss import PrmLoss

    ours, theirs = same_start(base, tmp_path / "one"), same_start(base, tmp_path / "two")
    inputs = DataCollatorForTokenClassification(AutoTokenizer.from_pretrained(base))(rows())
    expected = theirs(**inputs)
    expected.loss.backward()
    marked = inputs["labels"].flatten() != UNTRAINED
    right = (expected.logits.flatten(0, 1).argmax(-1) == inputs["labels"].flatten())[marked].float().mean()

    trained_N = marked.nonzero()[:, 0] - 1
    verdicts = Extra(value=inputs["labels"].flatten()[marked], layout="trained")
    ids = inputs["input_ids"]
    batch = Batch(input_ids_BT=ids, targets_BT=ids, trained_N=trained_N, extra={"verdicts": verdicts})
    hidden_BTH = ours.model(input_ids=ids, attention_mask=inputs["attention_mask"]).last_hidden_state
    output = PrmLoss()(batch, Outputs(values_BTC=ours.score(hidden_BTH)))
    (term,), (accuracy,) = output.terms, output.metrics
    (term.total / term.count).backward()
    assert (term.total / term.count).item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-6)
    assert (accuracy.total / accuracy.count).item() == pytest.approx(right.item())
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert float((mine.grad - their.grad).norm()) <= 1e-5 * float(their.grad.norm()), name


def predictions(trained: Any, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    batch = Batch(input_ids_BT=ids, targets_BT=torch.full_like(ids, UNTRAINED), trained_N=torch.zeros(0).long())
    with torch.no_grad():
        return trained.model.compute(trained.model.module.eval(), batch, VALUES).values_BTC[0]


def test_right_steps_are_told_from_wrong_ones_and_the_folder_opens_in_transformers(train: Train) -> None:
    trained = train("run", trainer={"max_steps": 100, "eval_at_end": True})
    assert trained.metrics["eval_accuracy"] == 1.0
    rules = compose({"model": {"name": "tiny"}, "plugins": ["prm"]}).items("health_rule")
    assert {item.target["metric"] for item in rules.values()} <= trained.metrics.keys()
    assert all(name.startswith("prm-") and item.target["source"] for name, item in rules.items())
    model = AutoModelForTokenClassification.from_pretrained(trained.folder).eval()
    for row in rows("eval", 4):
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(logits, predictions(trained, row["input_ids"]), rtol=1e-4, atol=1e-5)
        at = [place for place, label in enumerate(row["labels"]) if label != UNTRAINED]
        assert logits[at].argmax(-1).tolist() == [row["labels"][place] for place in at]


def test_the_exported_adapter_opens_in_plain_peft(train: Train, base: Path) -> None:
    trained = train("run", plugins=["lora"], lora={"r": 4})
    assert json.loads((trained.folder / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    fresh = AutoModelForTokenClassification.from_pretrained(base, num_labels=2)
    model, row = peft.PeftModel.from_pretrained(fresh, trained.folder).eval(), rows()[0]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([row])).logits[0], predictions(trained, row), rtol=1e-4, atol=1e-5
        )


def test_rows_of_the_format_steps_are_read(base: Path, tmp_path: Path) -> None:
    """Marks and verdicts come from a file, those of all steps or of the last ones."""
    from pegbox.run import execute

    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    vocabulary = {"|": 10, **{f"t{number}": number for number in range(11, 256)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t99"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t98").save_pretrained(folder)
    written = []
    for number in range(12):
        verdicts = [bool(number >> bit & 1) for bit in range(3)]
        steps = ["t20 t21" if right else "t60" for right in verdicts]
        written.append({"prompt": f"t{30 + number}", "completions": steps, "labels": verdicts})
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    data = {
        "train": [{"path": str(tmp_path / "steps.jsonl"), "format": "steps", "options": {"step_separator": "|"}}],
        "cache": "off",
    }
    config = {
        "model": {"name": str(folder)},
        "output": str(tmp_path / "run"),
        "plugins": ["hf", "data", "prm", "adamw", "trainer"],
        "data": data,
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 60, "progress": "none", "device": "cpu", "save_every": None},
    }
    outcome = execute(compose(config))
    assert outcome.metrics["accuracy"] == 1.0
    data["train"][0]["options"]["train_on_last_step_only"] = True
    outcome = execute(compose(config | {"output": str(tmp_path / "last")}))
    assert outcome.metrics["accuracy"] == 1.0


@pytest.mark.parametrize(
    "laid_out",
    [
        {"trainer": {"micro_batch": 1, "accumulation": 4}},
        {"trainer": {"batch": 4, "micro_batch": 3}},
    ],
)
def test_training_does_not_depend_on_the_split(laid_out: dict[str, Any], train: Train) -> None:
    whole, split = train("whole"), train("split", **laid_out)
    for name, weight in whole.weights().items():
        torch.testing.assert_close(split.weights()[name], weight, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("last_only", [False, True])
def test_packed_training_equals_padded_training(last_only: bool, train: Train) -> None:
    """One bin holds all rows of an epoch, so that both take the same rows in a step."""
    more = {"last_only": last_only}
    padded = train("padded", trainer={"micro_batch": 12}, **more)
    packed = train("packed", plugins=["packing"], packing={"length": 512}, trainer={"micro_batch": 1}, **more)
    assert packed.metrics["loss"] == pytest.approx(padded.metrics["loss"], rel=1e-5)
    for name, weight in padded.weights().items():
        torch.testing.assert_close(packed.weights()[name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_a_stopped_run_goes_on_with_the_same_bits(train: Train) -> None:
    whole = train("whole")
    train("run", stop=3)
    resumed = train("run")
    for name, weight in whole.weights().items():
        assert torch.equal(resumed.weights()[name], weight), name
