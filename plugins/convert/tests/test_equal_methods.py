"""A converted config of preferences or a reward model trains as the original: losses of every step beside those of
TRL's own trainer, on the same tiny model and rows.

The config goes through TRL's parser, and the objects into the trainer that its script makes. Axolotl trains with the
same trainers: its configs stand beside the arguments and rows that they become there.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rollouts import Rollout, RolloutBatch
from pegbox.run import execute
from pegbox_convert.converting import convert_file
from two_programs import COMMON, logged

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
WORDS = ["one", "two words", "and three words", "up to four words", "x"]
PAIRS = [
    {"prompt": f"say {n}: ", "chosen": WORDS[n % 5] * (n % 3 + 1), "rejected": WORDS[(n + 2) % 5] * (n % 2 + 1)}
    for n in range(20)
]
LETTERS = [{**row, "prompt": chr(97 + n)} for n, row in enumerate(PAIRS)]
SINGLE = [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 3 > 0} for n, row in enumerate(PAIRS)]
TALKS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PAIRS
]
WHOLE = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in TALKS]
STEADY = {"learning_rate": 1e-2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4, "max_length": 128}
RUNS: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "dpo, defaults, accumulated": ("dpo", PAIRS, {**STEADY, "gradient_accumulation_steps": 2}),
    "dpo, two losses, conversations": (
        "dpo",
        TALKS,
        {**STEADY, "loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2], "beta": 0.3, "ld_alpha": 0.5},
    ),
    "dpo, ipo, precomputed": ("dpo", PAIRS, {**STEADY, "loss_type": ["ipo"], "precompute_ref_log_probs": True}),
    "kto, weighed": ("kto", SINGLE, {**STEADY, "desirable_weight": 1.5, "undesirable_weight": 0.75}),
    "kto, without its divergence": ("kto", SINGLE, {**STEADY, "loss_type": "apo_zero_unpaired", "beta": 0.2}),
    "kto, without it, precomputed": (
        "kto",
        SINGLE,
        {**STEADY, "loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True},
    ),
    "orpo, prompts of one token": ("orpo", LETTERS, {**STEADY, "beta": 0.3}),
    "cpo, hinge": ("cpo", PAIRS, {**STEADY, "loss_type": "hinge", "cpo_alpha": 0.5}),
    "simpo": ("cpo", PAIRS, {**STEADY, "loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.5, "simpo_gamma": 0.5}),
    "simpo, conversations, alphapo": (
        "cpo",
        TALKS,
        {**STEADY, "loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 0.0},
    ),
    "reward, conversations, centred": ("reward", WHOLE, {**STEADY, "center_rewards_coefficient": 0.05}),
}


def losses_of_trl(method: str, path: Path) -> list[float]:
    """Of each step, by the trainer of a method, as `trl METHOD --config FILE` makes it."""
    import importlib

    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import ModelConfig, ScriptArguments, TrlParser

    module = importlib.import_module(f"trl.experimental.{method}" if method in ("orpo", "cpo") else "trl")
    name = "Reward" if method == "reward" else method.upper()
    parser = TrlParser((ScriptArguments, getattr(module, f"{name}Config"), ModelConfig))
    script, training, model = parser.parse_args_and_config(args=["--config", str(path)])
    if method == "reward":
        policy = AutoModelForSequenceClassification.from_pretrained(model.model_name_or_path, num_labels=1)
    else:
        policy = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, dtype=model.dtype)
    trainer = getattr(module, f"{name}Trainer")(
        model=policy,
        args=training,
        train_dataset=load_dataset(script.dataset_name)[script.dataset_train_split],
        processing_class=AutoTokenizer.from_pretrained(model.model_name_or_path),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_by_pegbox(path: Path, **watching: object) -> None:
    """Run what a config becomes; plugins that only watch are listed last."""
    converted = convert_file(path)
    assert converted.valid, converted.notes
    plugins = [*converted.config["plugins"], *watching]
    execute(compose({**converted.config, "plugins": plugins, "output": "ours"}, instances=watching))


def losses_of_pegbox(path: Path) -> list[float]:
    run_by_pegbox(path)
    return [line["loss"] for line in logged("train")]


def write_rows(rows: list[dict[str, Any]]) -> None:
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def with_head() -> None:
    """Make the tiny model a classifier, whose head both programs begin with."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_pretrained("tiny", num_labels=1).save_pretrained("tiny")


def assert_equal(method: str, options: dict[str, Any], ours: Path) -> None:
    """Both programs have the same losses; the options are those of TRL's arguments, the rows those in `rows`."""
    Path("theirs.yaml").write_text(yaml.safe_dump({**COMMON, **options, "output_dir": "theirs"}))
    theirs, made = losses_of_trl(method, Path("theirs.yaml")), losses_of_pegbox(ours)
    assert len(made) == len(theirs) == 5
    assert max(theirs) - min(theirs) > 100 * TOLERANCE
    assert made == pytest.approx(theirs, abs=TOLERANCE)


@pytest.mark.parametrize("name", RUNS)
def test_a_converted_config_of_trl_has_the_losses_of_its_trainer(name: str, workplace: Path) -> None:
    method, rows, options = RUNS[name]
    write_rows(rows)
    if method == "reward":
        with_head()
    Path("run.sh").write_text(f"trl {method} --config theirs.yaml\n")
    assert_equal(method, options, Path("run.sh"))


AXOLOTL = {
    "base_model": "tiny",
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_steps": 5,
    "learning_rate": 1e-2,
    "optimizer": "adamw_torch_fused",
    "lr_scheduler": "linear",
    "warmup_steps": 0,
    "sequence_len": 128,
    "shuffle_merged_datasets": False,
    "logging_steps": 1,
    "val_set_size": 0.0,
    "bf16": False,
    "chat_template": "tokenizer_default",
}
ASKED = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in PAIRS]
VOTES = [{"ask": row["prompt"], "say": row["completion"], "liked": row["label"]} for row in SINGLE]
OWN = {"field_prompt": "ask", "field_chosen": "good", "field_rejected": "bad"}
FORMS = {"prompt_format": "Q: {prompt} A:", "chosen_format": " {chosen}.", "rejected_format": " {rejected}."}
FORMED = [
    {
        "prompt": f"Q: {row['prompt']} A:",
        "chosen": f" {row['chosen']}.",
        "rejected": f" {row['rejected']}.",
    }
    for row in PAIRS
]
FROM_AXOLOTL: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, list[dict[str, Any]], dict[str, Any]]] = {
    "dpo, columns and forms of its own": (
        ASKED,
        {"rl": "dpo", "rl_beta": 0.3, "type": {**OWN, **FORMS}},
        "dpo",
        FORMED,
        {"beta": 0.3},
    ),
    "ipo": (ASKED, {"rl": "ipo", "rl_beta": 0.2, "type": OWN}, "dpo", PAIRS, {"loss_type": ["ipo"], "beta": 0.2}),
    "kto": (
        VOTES,
        {
            "rl": "kto",
            "rl_beta": 0.5,
            "kto_desirable_weight": 0.5,
            "kto_undesirable_weight": 1.0,
            "type": {"field_prompt": "ask", "field_completion": "say", "field_label": "liked"},
        },
        "kto",
        SINGLE,
        {"beta": 0.5, "desirable_weight": 0.5},
    ),
    "simpo, conversations": (
        [
            {**row, "messages": row["prompt"], "chosen": row["chosen"][0], "rejected": row["rejected"][0]}
            for row in TALKS
        ],
        {"rl": "simpo", "rl_beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.1, "type": "chat_template.default"},
        "cpo",
        TALKS,
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.2, "cpo_alpha": 0.1},
    ),
    "reward": (
        [{"input": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS],
        {
            "reward_model": True,
            "model_type": "AutoModelForSequenceClassification",
            "num_labels": 1,
            "center_rewards_coefficient": 0.05,
            "type": "bradley_terry.chat_template",
        },
        "reward",
        WHOLE,
        {"center_rewards_coefficient": 0.05},
    ),
}


@pytest.mark.parametrize("name", FROM_AXOLOTL)
def test_a_converted_config_of_axolotl_has_the_losses_of_trls_trainer(name: str, workplace: Path) -> None:
    rows, config, method, of_trl, options = FROM_AXOLOTL[name]
    config = {**AXOLOTL, **config}
    Path("axolotl.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets = [{"path": "axolotl.jsonl", "ds_type": "json", "type": config.pop("type")}]
    Path("axolotl.yaml").write_text(yaml.safe_dump({**config, "datasets": datasets}))
    write_rows(of_trl)
    if method == "reward":
        with_head()
    assert_equal(method, {**STEADY, **options}, Path("axolotl.yaml"))


class Recorder:
    """Makes what a random model samples look like answers, and keeps it."""

    def __init__(self) -> None:
        self.made: list[RolloutBatch] = []

    @hookimpl(wrapper=True)
    def generate_rollouts(self) -> Generator[None, RolloutBatch, RolloutBatch]:
        sampled = yield
        answers = tuple(self._answer(one, 1 + at % 7) for at, one in enumerate(sampled.rollouts))
        self.made.append(replace(sampled, rollouts=answers))
        return self.made[-1]

    @staticmethod
    def _answer(one: Rollout, length: int) -> Rollout:
        """Most of them end early; padding, which TRL takes for an end, is another token."""
        ids = tuple(token or END + 1 for token in one.completion)
        if length > len(ids):
            return replace(one, completion=ids)
        return replace(one, completion=(*ids[: length - 1], END), logps=one.logps[:length], finished=True)


END = 2
JUDGING = """
def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def vowels(completions, **_):
    return [sum(text_of(one).count(letter) for letter in "aeiou0123") / 3 for one in completions]


def named(completions, number, **_):
    return [len(set(text_of(one))) - 0.1 * row for one, row in zip(completions, number)]
"""
ASKING = [{"prompt": [{"role": "user", "content": f"say {n}"}], "number": n} for n in range(24)]
SAMPLED = {
    "reward_funcs": ["judging.vowels", "judging.named"],
    "reward_weights": [1.0, 0.5],
    "num_generations": 4,
    "max_completion_length": 6,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "learning_rate": 1e-2,
    "shuffle_dataset": False,
    "temperature": 0.9,
}
ONLINE: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo, defaults": ("grpo", {}),
    "cispo, a reference, batch scaling": (
        "grpo",
        {"loss_type": "cispo", "epsilon_high": 4.0, "beta": 0.05, "scale_rewards": "batch"},
    ),
    "dr_grpo twice, without truncated": (
        "grpo",
        {
            "loss_type": "dr_grpo",
            "num_iterations": 2,
            "mask_truncated_completions": True,
            "scale_rewards": "none",
            "epsilon": 0.05,
        },
    ),
    "rloo": ("rloo", {"beta": 0.05, "normalize_advantages": True}),
}


def figures_of_trl(method: str, path: Path, made: list[RolloutBatch]) -> list[dict[str, float]]:
    """Of each step, on completions that were sampled before."""
    import importlib
    import sys

    import trl
    from datasets import load_dataset

    replayed = iter(made)

    class Replaying(getattr(trl, f"{method.upper()}Trainer")):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids: Any, *_: Any) -> Any:
            rollouts = next(replayed).rollouts
            assert [tuple(ids) for ids in prompt_ids] == [one.prompt for one in rollouts]
            completions = [list(one.completion) for one in rollouts]
            return completions if method == "rloo" else (completions, None)

    script_type = importlib.import_module(f"trl.scripts.{method}").__dict__[f"{method.upper()}ScriptArguments"]
    parser = trl.TrlParser((script_type, getattr(trl, f"{method.upper()}Config"), trl.ModelConfig))
    script, training, model = parser.parse_args_and_config(args=["--config", str(path)])
    training.model_init_kwargs = {"dtype": model.dtype}
    sys.path.insert(0, str(Path.cwd()))
    judging = importlib.import_module("judging")
    trainer = Replaying(
        model=model.model_name_or_path,
        reward_funcs=[getattr(judging, name.partition(".")[2]) for name in script.reward_funcs],
        args=training,
        train_dataset=load_dataset(script.dataset_name)[script.dataset_train_split],
    )
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ONLINE)
def test_a_converted_online_config_makes_trls_steps_on_the_same_completions(
    name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling is ours; advantages, losses and gradient norms of each step are compared."""
    import sys

    method, options = ONLINE[name]
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    write_rows(ASKING)
    Path("judging.py").write_text(JUDGING)
    Path("theirs.yaml").write_text(yaml.safe_dump({**COMMON, **SAMPLED, **options, "output_dir": "theirs"}))
    Path("run.sh").write_text(f"trl {method} --config theirs.yaml\n")
    recorder = Recorder()
    run_by_pegbox(Path("run.sh"), recorder=recorder)
    theirs, ours = figures_of_trl(method, Path("theirs.yaml"), recorder.made), logged("train")
    assert len(ours) == len(theirs) == 4
    figures = ("loss", "grad_norm", "reward", "reward_std", "rewards/vowels/mean", "rewards/named/std")
    for name in figures:
        # A second update on the same completions has no rewards of its own.
        expected = {at: float(step[name]) for at, step in enumerate(theirs) if name in step}
        found = {at: step[name] for at, step in enumerate(ours) if name in step}
        assert found == pytest.approx(expected, rel=1e-4, abs=TOLERANCE), name
    # Before a policy has moved, RLOO's ratios of completions are 1, and its loss is the mean advantage: 0.
    moving = "grad_norm" if method == "rloo" else "loss"
    assert max(step[moving] for step in theirs) - min(step[moving] for step in theirs) > 100 * TOLERANCE
