"""`pegbox memory` says what an H100 then had in memory: models of full size, in steps that were measured.

The figures are those of `tests/benchmarks/gpu_step.py` (torch's `max_memory_allocated`). Where a GPU of 80 GB was
measured, no layer was computed again.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pegbox_memory.estimate import GIB, Estimate, estimate

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "step.csv"
CASES = ("gpt-oss-20b, attention", "gpt-oss-20b, attention and experts", "llama-8b, all linear")
H100_GIB, SMALL_GIB = 79.0, 16.0


@dataclass(frozen=True)
class Told:
    """A case of the benchmark as a config."""

    config: dict[str, Any]
    tokens: int

    def without(self, *plugins: str) -> Told:
        kept = {key: value for key, value in self.config.items() if key not in plugins}
        return Told({**kept, "plugins": [name for name in kept["plugins"] if name not in plugins]}, self.tokens)

    def estimate(self, *overrides: str, tokens: int | None = None) -> Estimate:
        return estimate(self.config, overrides, tokens=tokens or self.tokens)


@pytest.fixture
def told(tmp_path: Path) -> Callable[[str], Told]:
    """`told("llama-8b, all linear")`: what `gpu_step.py` runs, but for data and weights."""
    transformers = pytest.importorskip("transformers")
    from step_cases import CASES

    def make(name: str) -> Told:
        case = CASES[name]
        architectures = [case.config.replace("Config", "ForCausalLM")]
        made = getattr(transformers, case.config)(**case.fields, dtype="bfloat16", architectures=architectures)
        made.save_pretrained(tmp_path / "model")
        lora: dict[str, Any] = {"r": 16, "alpha": 32, "targets": case.lora["target_modules"]}
        if "target_parameters" in case.lora:
            lora["parameters"] = case.lora["target_parameters"]
        trainer = {"max_steps": 9, "batch": case.rows, "micro_batch": case.rows, "precision": "bf16"}
        sections: Mapping[str, Mapping[str, Any]] = {"hf": {}, "lora": lora, **case.ours, "sft": {}, "optim": {}}
        sections = {**sections, "trainer": {**trainer, "save_every": None, "progress": "none"}}
        filled = {name: dict(section) for name, section in sections.items() if section}
        plugins, output = list(sections), str(tmp_path / "run")
        return Told(
            {"model": {"name": str(tmp_path / "model")}, "plugins": plugins, "output": output} | filled, case.length
        )

    return make


def measured(case: str) -> int:
    """Bytes at the peak of our own run."""
    with RESULTS.open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["case"] == case and row["contender"] == "pegbox"]
    return int(found[-1]["peak_bytes"])


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_within_a_tenth_of_what_an_h100_had_allocated(told: Callable[[str], Told], case: str) -> None:
    made = told(case).without("activations").estimate()
    assert made.allocated == pytest.approx(measured(case), rel=0.1)


def test_projections_in_plain_peft_are_counted_too(told: Callable[[str], Told]) -> None:
    """Measured on 2026-11-22 before lora-kernels was among the plugins of this case: 64,264,591,872 bytes."""
    made = told("gpt-oss-20b, attention").without("activations", "lora-kernels").estimate()
    assert made.allocated == pytest.approx(64_264_591_872, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_an_h100_nothing_is_said_to_be_computed_again(told: Callable[[str], Told], case: str) -> None:
    made = told(case).estimate(f"activations.memory_gib={H100_GIB}")
    assert made.recomputed == 0
    assert made.allocated == pytest.approx(measured(case), rel=0.1)


@pytest.mark.slow
def test_gpt_oss_with_packed_experts_is_said_to_train_in_16_gib(told: Callable[[str], Told], tmp_path: Path) -> None:
    file = tmp_path / "model" / "config.json"
    case = told("gpt-oss-20b, attention")
    stored = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": {"quant_method": "mxfp4"}}
    file.write_text(json.dumps(stored), encoding="utf-8")
    case.config["plugins"].insert(1, "mxfp4")
    made = case.estimate("activations.policy=full", tokens=2048)
    assert made.process <= SMALL_GIB * GIB
    packed = 24 * 32 * (5760 + 2880) * 2880 * 17 // 32
    rest = 2 * 201088 * 2880 * 2 + 24 * (2 * 4096 + 2 * 512) * 2880 * 2
    weights = next(row.bytes for row in made.rows if row.kind == "frozen weights")
    assert weights == pytest.approx(packed + rest, rel=0.01)
