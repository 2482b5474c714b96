"""Online runs: the estimate is what the run has in memory, whether sampling or learning needs the most."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from measured_run import peak_of_run
from pegbox.errors import ConfigError
from pegbox.plan import compose
from pegbox_memory.estimate import Estimate, estimate
from pegbox_memory.generation import Generation
from pegbox_memory.shape import shape_of

Config = Callable[..., dict[str, Any]]
PROMPT = 24


def online(config_of: Config, *plugins: str, **sections: Any) -> dict[str, Any]:
    grpo = {"samples": 4, "max_completion_length": 40, "completions": 0, **sections.pop("grpo", {})}
    trainer = {"batch": 4, "micro_batch": 2, "max_steps": 2, **sections.pop("trainer", {})}
    config = config_of(*plugins, grpo=grpo, trainer=trainer, **sections)
    return {**config, "plugins": [name for name in config["plugins"] if name != "sft"]}


def bytes_of(made: Estimate) -> dict[str, int]:
    return {row.kind: row.bytes for row in made.rows}


ENGINE = ("grpo", "rollout-hf")
LONG = {"samples": 48, "max_completion_length": 40}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "many completions": (("lora", *ENGINE), {"grpo": LONG, "trainer": {"batch": 1, "micro_batch": 1}}, "sampling"),
    "many completions, bf16": (
        ("lora", *ENGINE),
        {"grpo": LONG, "trainer": {"batch": 1, "micro_batch": 1, "precision": "bf16"}},
        "sampling",
    ),
    "few at a time": (ENGINE, {"rollout-hf": {"batch": 2}, "trainer": {"batch": 1, "micro_batch": 4}}, "backward"),
    "lora, large micro-batches": (("lora", *ENGINE), {"trainer": {"batch": 1, "micro_batch": 4}}, "backward"),
    "a copy of the reference": (("reference", *ENGINE), {"grpo": {"beta": 0.1}, "trainer": {"batch": 1}}, ""),
}


SLOW = {"many completions", "many completions, bf16"}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CASES])
def test_an_estimate_is_what_an_online_run_has_in_memory(config_of: Config, case: str) -> None:
    plugins, sections, during = CASES[case]
    config = online(config_of, *plugins, **sections)
    made = estimate(config, tokens=PROMPT)
    assert during in made.during
    assert made.allocated == pytest.approx(peak_of_run(config, PROMPT), rel=0.1)


def test_keys_and_values_are_those_that_the_model_keeps_for_all_completions(config_of: Config) -> None:
    config = online(config_of, *ENGINE, grpo={"samples": 32, "max_completion_length": 100})
    made = estimate(config, tokens=PROMPT)
    shape = json.loads((Path(config["model"]["name"]) / "config.json").read_text())
    head = shape["hidden_size"] // shape["num_attention_heads"]
    expected = 128 * (PROMPT + 100) * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head * 4
    assert bytes_of(made)["cache"] == pytest.approx(expected, rel=1e-4)


def test_a_reference_is_counted_where_it_is_a_model_of_its_own(config_of: Config) -> None:
    sections = {"grpo": {"beta": 0.1}}
    alone = bytes_of(estimate(online(config_of, "reference", *ENGINE, **sections), tokens=PROMPT))
    assert alone["reference"] == pytest.approx(alone["trained weights"] + alone["buffers"])
    adapted = bytes_of(estimate(online(config_of, "lora", "reference", *ENGINE, **sections), tokens=PROMPT))
    assert "reference" not in adapted


@pytest.mark.parametrize(
    ("plugins", "sections", "note"),
    [
        (("grpo", "rollout-vllm"), {}, "completions are made elsewhere"),
        (ENGINE, {"rollout-hf": {"continuous": "on"}}, "fills what is free"),
    ],
)
def test_what_is_not_counted_is_said(config_of: Config, plugins: tuple[str, ...], sections: Any, note: str) -> None:
    made = estimate(online(config_of, *plugins, **sections), tokens=PROMPT)
    assert any(note in said for said in made.notes)
    assert "cache" not in bytes_of(made)


def test_packed_completions_fill_bins_and_are_sampled_at_their_own_length(config_of: Config) -> None:
    data = {"max_length": PROMPT, "train": [{"path": "prompts.jsonl", "format": "prompts"}]}
    shape = shape_of(
        compose(online(config_of, "data", *ENGINE, "packing", packing={"length": 256}, data=data)), None, None
    )
    assert (shape.tokens, shape.prompt, shape.generation) == (256, PROMPT, Generation(16, 4, PROMPT, PROMPT + 40))
    with pytest.raises(ConfigError, match="--tokens"):
        estimate(online(config_of, *ENGINE))
