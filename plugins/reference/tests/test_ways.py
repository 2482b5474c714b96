"""Every way to a reference gives the log-probabilities of the model that the policy starts from, and moves nothing."""

from __future__ import annotations

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError
from pegbox.hooks import hookimpl
from pegbox.rows import UNTRAINED
from pegbox.testing.tiny import tiny_model
from reference_rows import Tiny, Watcher, expected, pair, run
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

SEEDS, HELD_OUT = range(10), range(20, 25)
WAYS = [("lora", "adapter"), ("lora", "copy"), ("lora", "precomputed"), ("full", "copy"), ("full", "precomputed")]


def with_reference(folder: Path, weights: str, **reference: Any) -> Watcher:
    watcher, plugins = Watcher(), ["lora"] if weights == "lora" else []
    sections = {"reference": {"cache": str(folder / "cache"), **reference}, "trainer": {"eval_at_start": True}}
    run(folder, Tiny(SEEDS, HELD_OUT), *plugins, "watcher", "reference", watcher=watcher, **sections)
    return watcher


@pytest.mark.parametrize(("weights", "how"), [*WAYS, ("lora", "auto"), ("full", "auto")])
def test_the_reference_is_the_model_that_the_policy_starts_from(weights: str, how: str, tmp_path: Path) -> None:
    watcher = with_reference(tmp_path, weights, how=how)
    start, held_out = expected(SEEDS), expected(HELD_OUT)
    assert len(watcher.steps) == 4
    for seen in watcher.steps:
        for row, (_, reference) in seen.items():
            torch.testing.assert_close(reference, start[row], rtol=1e-5, atol=1e-5)
    assert watcher.held_out.keys() == held_out.keys()
    for row, (_, reference) in watcher.held_out.items():
        torch.testing.assert_close(reference, held_out[row], rtol=1e-5, atol=1e-5)
    moved = [(policy - reference).abs().max() for policy, reference in watcher.steps[-1].values()]
    assert max(moved) > 0.1, "the policy has not moved: the test would prove nothing"


class Wanting(Tiny):
    """Its runs have a loss that says that it needs a reference, and does nothing with it."""

    @hookimpl(wrapper=True)
    def build_loss(self) -> Generator[None, Any, Any]:
        loss = yield
        loss.extras = frozenset({"reference_logps"})
        return loss


@pytest.mark.parametrize(("weights", "how"), WAYS)
def test_a_run_beside_a_reference_is_the_same_run(weights: str, how: str, tmp_path: Path) -> None:
    """The same bits with dropout: no random number is drawn, no mode, flag or gradient is left behind."""
    adapter, losses = ["lora"] if weights == "lora" else [], []
    for folder, plugins in (("without", []), ("with", ["reference"])):
        sections = {"reference": {"how": how, "cache": str(tmp_path / "cache")}} if plugins else {}
        tiny = (Wanting if plugins else Tiny)(SEEDS, attention_dropout=0.1)
        run(tmp_path / folder, tiny, *adapter, "sft", *plugins, **sections)
        lines = (tmp_path / folder / "run" / "metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["copy", "precomputed"])
def test_another_model_can_be_the_reference(how: str, tmp_path: Path) -> None:
    watcher = with_reference(tmp_path, "full", how=how, model="another")
    start = expected(SEEDS, seed=7)
    for row, (_, reference) in watcher.steps[0].items():
        torch.testing.assert_close(reference, start[row], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plugins", [[], ["lora"]])
def test_a_copy_has_the_data_type_asked_for(plugins: list[str], tmp_path: Path) -> None:
    watcher, tiny = Watcher(), Tiny(SEEDS)
    run(tmp_path, tiny, *plugins, "watcher", "reference", watcher=watcher, reference={"dtype": "bfloat16"})
    assert [model.role for model in tiny.loaded] == ["policy", "reference"]
    assert {p.dtype for p in tiny.loaded[1].module.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in tiny.loaded[0].module.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in tiny.loaded[1].module.parameters())


def test_a_copy_that_is_not_the_policys_start_is_refused(tmp_path: Path) -> None:
    """An adapter that takes its part out of the base is the base still; one that was trained before is not."""
    run(tmp_path / "whole", Tiny(SEEDS), "lora", "watcher", "reference", watcher=Watcher(), lora={"init": "olora"})
    run(tmp_path / "first", Tiny(SEEDS), "lora", "sft", trainer={"save_every": 4})
    folder = str(tmp_path / "first" / "run")
    continued = {"r": 4, "adapter": folder}
    with pytest.raises(ConfigError, match="is not what the policy starts from"):
        run(tmp_path / "second", Tiny(SEEDS), "lora", "watcher", "reference", watcher=Watcher(), lora=continued)


def test_what_the_policy_starts_from_may_be_an_adapter(tmp_path: Path) -> None:
    run(tmp_path / "first", Tiny(SEEDS), "lora", "sft", lora={"r": 4})
    watcher = Watcher()
    sections = {
        "lora": {"r": 4, "adapter": str(tmp_path / "first" / "run")},
        "reference": {"how": "precomputed", "cache": str(tmp_path / "cache")},
    }
    run(tmp_path / "second", Tiny(SEEDS), "lora", "watcher", "reference", watcher=watcher, **sections)
    for policy, reference in watcher.steps[0].values():
        torch.testing.assert_close(policy, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["adapter", "precomputed"])
def test_the_reference_is_trls_of_an_adapter_that_has_moved(how: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    words = {"<end>": 0, "<pad>": 1, **{f"t{i}": i for i in range(2, 260)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")), eos_token="<end>", pad_token="<pad>"
    )
    theirs = DPOTrainer(
        model=tiny_model(initializer_range=0.1).module,
        args=DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False),
        train_dataset=Dataset.from_list([{"prompt": "t5", "chosen": "t6", "rejected": "t7"}]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    for name, parameter in theirs.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    rows = []
    for seed in SEEDS:
        example, cut = pair(seed), pair(seed).documents[0]
        prompt = sum(label == UNTRAINED for label in example.labels[:cut])
        ids = example.input_ids
        rows.append({"prompt_ids": ids[:prompt], "chosen_ids": ids[prompt:cut], "rejected_ids": ids[cut + prompt :]})
    batch = theirs.data_collator(rows)
    chosen, rejected = theirs.compute_ref_log_probs(theirs.model, batch)

    watcher = with_reference(tmp_path, "lora", how=how)
    for row, (_, reference) in watcher.steps[-1].items():
        tokens = len(rows[row]["chosen_ids"])
        torch.testing.assert_close(reference[:tokens].sum(), chosen[row], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(reference[tokens:].sum(), rejected[row], rtol=1e-5, atol=1e-5)
