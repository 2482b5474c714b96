"""A converted config trains as the original: losses of every step beside those of TRL, on the same tiny model and rows.

TRL runs as its script does: the file goes through its parser, and the objects into its SFTTrainer. Adapters begin with
the same first factors on both sides, because each program draws its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_convert.converting import convert_file
from safetensors.torch import load_file
from transformers import Trainer
from two_programs import COMMON, logged

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
CHAT = [
    {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "word " * (n % 5 + 1)}]}
    for n in range(20)
]
PAIRS = [{"prompt": f"number {n} is ", "completion": "even" * (n % 3 + 1)} for n in range(20)]
TEXTS = [{"text": "once upon a time " * (n % 4 + 1)} for n in range(20)]
RUNS = {
    "all parameters, answers of conversations, cosine": (
        CHAT,
        {
            "assistant_only_loss": True,
            "learning_rate": "3e-3",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "max_grad_norm": 0.5,
        },
    ),
    "whole conversations, defaults": (CHAT, {"learning_rate": 1e-2}),
    "an adapter, completions": (
        PAIRS,
        {
            "use_peft": True,
            "lora_r": 4,
            "lora_alpha": 16,
            "use_rslora": True,
            "lora_dropout": 0.0,
            "learning_rate": 2e-2,
            "completion_only_loss": True,
        },
    ),
    "packed conversations, an epoch in each step": (
        CHAT,
        {
            "packing": True,
            "max_length": 160,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "learning_rate": 1e-2,
            "attn_implementation": "eager",
            "lr_scheduler_type": "constant",
        },
    ),
    "weighted loss, truncated texts": (
        TEXTS,
        {"loss_type": "dft", "max_length": 24, "learning_rate": 5e-3, "gradient_checkpointing": False},
    ),
}
SAME_FACTORS = """
import torch
from pegbox.hooks import hookimpl


class Plugin:
    @hookimpl(wrapper=True)
    def apply_adapters(self):
        model = yield
        for name, parameter in model.module.named_parameters():
            if "lora_A" in name:
                parameter.data.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
        return model
"""


def trained_by_trl(path: Path) -> Trainer:
    """As `trl sft --config FILE` trains."""
    from datasets import load_dataset
    from trl import (
        DatasetMixtureConfig,
        ModelConfig,
        ScriptArguments,
        SFTConfig,
        SFTTrainer,
        TrlParser,
        get_peft_config,
    )

    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
    script, training, model, _ = parser.parse_args_and_config(args=["--config", str(path)])
    training.model_init_kwargs = {"dtype": model.dtype, "attn_implementation": model.attn_implementation}
    dataset = load_dataset(script.dataset_name)
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=dataset[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(model),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(torch.linspace(-0.2, 0.2, parameter.numel()).view_as(parameter))
    trainer.train()
    return trainer


def losses_of_trl(path: Path) -> list[float]:
    return [entry["loss"] for entry in trained_by_trl(path).state.log_history if "loss" in entry]


def losses_of_pegbox(path: Path) -> list[float]:
    converted = convert_file(path)
    assert converted.valid, converted.notes
    config = converted.config
    config["output"] = "ours"
    if "lora" in config["plugins"]:
        Path("same_factors.py").write_text(SAME_FACTORS)
        config["plugins"].append("./same_factors.py")
    execute(compose(config))
    return [line["loss"] for line in logged("train")]


@pytest.mark.parametrize("name", RUNS)
def test_a_converted_config_has_the_losses_of_trl(name: str, workplace: Path) -> None:
    rows, options = RUNS[name]
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("trl.yaml").write_text(yaml.safe_dump({**COMMON, **options, "output_dir": "theirs"}))
    theirs, ours = losses_of_trl(Path("trl.yaml")), losses_of_pegbox(Path("trl.yaml"))
    assert len(ours) == len(theirs) == 5
    assert abs(theirs[-1] - theirs[0]) > 100 * TOLERANCE
    assert ours == pytest.approx(theirs, abs=TOLERANCE)


BY_THE_BEST = {
    "by epoch": {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 3, "max_steps": -1},
    "by epoch, so many steps": {"save_strategy": "epoch", "eval_strategy": "epoch", "max_steps": 13},
    "saved when best": {"save_strategy": "best", "eval_strategy": "epoch", "metric_for_best_model": "loss"},
}


@pytest.mark.parametrize("name", BY_THE_BEST)
def test_a_converted_config_evaluates_when_trl_does_and_exports_the_same_best(name: str, workplace: Path) -> None:
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    Path("rows/test.jsonl").write_text("".join(json.dumps({"text": f"ZQ%{n}&~XJ" * 3}) + "\n" for n in range(5)))
    chosen = {"load_best_model_at_end": True, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    length = {"num_train_epochs": 3, "max_steps": -1}
    options = {**COMMON, **length, **chosen, **BY_THE_BEST[name], "output_dir": "theirs"}
    Path("trl.yaml").write_text(yaml.safe_dump(options))
    theirs = trained_by_trl(Path("trl.yaml"))
    losses_of_pegbox(Path("trl.yaml"))
    expected = {entry["step"]: entry["eval_loss"] for entry in theirs.state.log_history if "eval_loss" in entry}
    found = {entry["step"]: entry["eval_loss"] for entry in logged("eval")}
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-4)
    assert theirs.state.best_global_step == min(found, key=found.__getitem__) < theirs.state.global_step
    weights = theirs.model.state_dict()
    for key, value in load_file("ours/model.safetensors").items():
        torch.testing.assert_close(value, weights[key], atol=1e-4, rtol=0)
