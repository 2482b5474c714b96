"""Whole runs: the losses are TRL's, and neither packing nor the split of a step changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pairs_of_answers import Pairs, pair, some_pairs
from pegbox import hooks
from pegbox.errors import ConfigError, DataError
from pegbox.plan import compose
from pegbox.rows import Example
from pegbox.run import execute
from pegbox.testing.tiny import tiny_processor

STEPS, PAIRS = 5, 20
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")
METRICS += ("logps/rejected", "entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")


def run(base: Path, folder: Path, rows: Pairs, *plugins: str, **sections: Any) -> list[dict[str, Any]]:
    """The logged records of a run of five steps of four pairs."""
    trainer = {"max_steps": STEPS, "micro_batch": 2, "accumulation": 2, "log_every": 1, "shuffle": False}
    trainer |= {"save_every": None, "progress": "none", "device": "cpu", "max_grad_norm": 1.0}
    config = {
        "model": {"name": str(base)},
        "output": str(folder),
        "plugins": ["hf", "pairs", *plugins, "dpo", "adamw", "trainer"],
        "adamw": {"learning_rate": 1e-2, "schedule": "constant", "weight_decay": 0.0},
        **sections,
        "trainer": {**trainer, **sections.get("trainer", {})},
    }
    execute(compose(config, instances={"pairs": rows}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def examples(count: int = PAIRS) -> list[Example]:
    return [pair(*one) for one in some_pairs(count)]


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], list[Example]]:
    """What TRL's trainer logs of five steps, and the rows that it trained on."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    def words(ids: list[int]) -> str:
        return " ".join(f"t{token}" for token in ids)

    names = ("prompt", "chosen", "rejected")
    texts = [dict(zip(names, map(words, one), strict=True)) for one in some_pairs(PAIRS)]
    texts = [{**text, "chosen": f" {text['chosen']} ", "rejected": f" {text['rejected']} "} for text in texts]
    arguments = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.25],
        beta=0.3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    trainer = DPOTrainer(
        model=str(base),
        args=arguments,
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.train()
    rows = [pair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in trainer.train_dataset]
    return [line for line in trainer.state.log_history if "loss" in line], rows


def test_every_step_and_metric_is_trls(base: Path, theirs: Any, tmp_path: Path) -> None:
    expected, rows = theirs
    section = {"loss": {"sigmoid": 1.0, "sft": 0.25}, "beta": 0.3, "token_metrics": True}
    ours = run(base, tmp_path / "run", Pairs(rows), "reference", dpo=section)
    assert len(ours) == len(expected) == STEPS
    assert abs(expected[-1]["rewards/margins"]) > 0.1, "the policy has not moved: the test would prove nothing"
    for mine, other in zip(ours, expected, strict=True):
        for name in ("loss", "grad_norm", *METRICS):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (mine["step"], name)


@pytest.mark.parametrize("section", [{}, {"loss": {"ipo": 1.0, "sft": 0.5}, "ld_alpha": 0.4}, {"use_weighting": True}])
def test_neither_packing_nor_the_split_changes_a_step(section: dict[str, Any], base: Path, tmp_path: Path) -> None:
    def losses(name: str, *plugins: str, **sections: Any) -> list[float]:
        rows = Pairs(examples(), examples(7))
        records = run(base, tmp_path / name, rows, *plugins, "reference", dpo=section, **sections)
        names = ("loss", "eval_loss", "rewards/margins", "eval_rewards/accuracies", "grad_norm", "logps/rejected")
        return [record[name] for record in records for name in names if name in record]

    whole = losses("whole", trainer={"micro_batch": 4, "accumulation": 1})
    assert len(whole) == STEPS * 4 + 2
    assert losses("split", trainer={"micro_batch": 1, "accumulation": 4}) == pytest.approx(whole, rel=1e-4, abs=1e-5)
    # All twenty pairs fit one bin: one step of everything, packed and not.
    once = {"max_steps": 1, "batch": PAIRS, "accumulation": 1, "eval_micro_batch": 7}
    plain = losses("plain", trainer={**once, "micro_batch": 5})
    packed = losses("packed", "packing", trainer={**once, "batch": 1, "micro_batch": 1}, packing={"length": 400})
    assert packed == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_health_rules_look_at_figures_that_are_logged(base: Path, tmp_path: Path) -> None:
    items = compose({"model": {"name": "tiny"}, "plugins": ["dpo"]}).items("health_rule").values()
    records = run(base, tmp_path / "run", Pairs(examples(), examples(4)), "reference")
    assert items
    assert {item.target["metric"] for item in items} <= {name for record in records for name in record}


def test_losses_of_a_whole_batch_refuse_a_step_that_is_split(base: Path, tmp_path: Path) -> None:
    section = {"loss": "aot"}
    with pytest.raises(ConfigError, match="needs the whole batch at once"):
        run(base, tmp_path / "split", Pairs(examples()), "reference", dpo=section)
    whole = {"micro_batch": 4, "accumulation": 1}
    records = run(base, tmp_path / "whole", Pairs(examples(4)), "reference", dpo=section, trainer=whole)
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_run_without_a_reference_is_refused_before_anything_is_loaded(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Add reference to plugins"):
        run(base, tmp_path / "run", Pairs(examples()))
    assert not (tmp_path / "run").exists()
    records = run(base, tmp_path / "sft", Pairs(examples(4)), dpo={"loss": "sft"})
    assert "rewards/margins" not in records[0]
    assert records[-1]["loss"] < records[0]["loss"]


def test_rows_that_are_no_pairs_are_refused(base: Path, tmp_path: Path) -> None:
    plain = Example(input_ids=[1, 2, 3], labels=[1, 2, 3])
    alone = Example(input_ids=[1, 2, 3], labels=[1, 2, 3], signs=(1,))
    turned = Example(**{**vars(pair([1], [2], [3])), "signs": (-1, 1)})
    empty = Example(**{**vars(pair([1], [2], [3])), "labels": [-100, 2, -100, -100]})
    for name, row, message in (
        ("plain", plain, "is no pair of a chosen and a rejected answer"),
        ("alone", alone, "is no pair of a chosen and a rejected answer"),
        ("turned", turned, "is no pair of a chosen and a rejected answer"),
        ("empty", empty, "row . of the data has a rejected answer without a trained token"),
    ):
        with pytest.raises(DataError, match=message):
            run(base, tmp_path / name, Pairs([row] * 4), "reference")
    with pytest.raises(DataError, match="is no pair"):
        run(base, tmp_path / "held-out", Pairs(examples(), [plain] * 4), "reference")
    for name, row in (("alone", alone), ("turned", turned)):
        mixed, whole = Pairs([*examples(1), row]), {"micro_batch": 2, "accumulation": 1, "max_steps": 1}
        with pytest.raises(DataError, match=r"have answers with the signs \[1, -1, "):
            run(base, tmp_path / f"mixed {name}", mixed, "reference", trainer=whole)


def test_rows_that_are_no_pairs_are_refused_before_a_model_is_loaded() -> None:
    alone = Example(input_ids=[1, 2, 3], labels=[1, 2, 3], signs=(1,))
    config = {"model": {"name": "absent"}, "plugins": ["pairs", "dpo"]}
    for rows, held_out in (([alone], ()), (examples(1), [alone])):
        ctx = compose(config, instances={"pairs": Pairs(rows, held_out)})
        split = "eval" if held_out else "train"
        with pytest.raises(DataError, match="Give the data the format preference"):
            ctx.call(hooks.build_dataset, ctx, tiny_processor(), split)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"loss": "exo_pair"}, "takes the logarithm of label_smoothing"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing is set, and nothing here uses it"),
        ({"discopop_tau": 0.1}, "discopop_tau is set, and nothing here uses it"),
        ({"loss": "nca_pair", "f_divergence": "forward_kl"}, "f_divergence is set, and nothing here uses it"),
        ({"loss": {"sigmoid": 1, "nca_pair": 1}, "f_divergence": "forward_kl"}, "nca_pair is not a function of the"),
        ({"f_alpha": 0.3}, "f_alpha is set, and nothing here uses it"),
        ({"loss": "sft", "beta": 0.2}, "beta is set, and nothing here uses it"),
        ({"loss": "sft", "ld_alpha": 0.5}, "ld_alpha is set, and nothing here uses it"),
        ({"loss": "aot", "use_weighting": True}, "which aot takes apart"),
        ({"loss": {"sigmoid": 1, "sft": 1}, "use_weighting": True}, "which sft takes apart"),
        ({"loss": {"sigmoid": 0}}, "each with a weight above 0"),
        ({"loss": {}}, "name at least one loss"),
        ({"loss": "sigmod"}, "sigmoid"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"model": {"name": "tiny"}, "plugins": ["dpo"], "dpo": section})
