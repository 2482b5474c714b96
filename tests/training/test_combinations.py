"""Plugins of training together: every pair of settings occurs in some run, and each run resumes to the same bits.

A pair that works alone with every third plugin hides few faults (Kuhn et al. 2004, Software Fault Interactions), so the
runs are an array that covers all pairs instead of all combinations: some tens of runs for some thousand combinations.
Every second run lists its plugins in reverse. Pairs that cannot be are written down with the error they must give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import combinations, product
from math import isfinite
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
import yaml
from pegbox.errors import PegboxError
from pegbox.plan import compose
from pegbox.run import execute

Choice = tuple[list[str], dict[str, Any]]
Factors = Mapping[str, Mapping[str, Choice]]
Run = dict[str, str]
STEPS, SAVED = 5, 3


def optimizer(name: str, *plugins: str) -> Choice:
    return ["optim", *plugins], {"optim": {"name": name, "learning_rate": 1e-2, "schedule": "constant"}}


LORA = {"lora": {"r": 4}}
OFF: Choice = ([], {})
FACTORS: Factors = {
    "weights": {
        "full": OFF,
        "freeze": (["freeze"], {"freeze": {"train": [r"layers\.1\.", "lm_head"]}}),
        "lora": (["lora"], LORA),
        "dora": (["lora"], {"lora": {"r": 4, "use_dora": True, "lr_ratio": 4, "dropout": 0.1}}),
        "qlora": (["lora", "bnb"], {**LORA, "bnb": {}}),
        "relora": (["lora", "relora"], {**LORA, "relora": {"every": 2, "warmup_steps": 1}}),
    },
    "optimizer": {
        "adamw": (["adamw"], {"adamw": {"learning_rate": 1e-2, "schedule": "constant"}}),
        "muon": optimizer("muon"),
        "adamw_8bit": optimizer("adamw_8bit", "bnb-optim"),
        "lion": optimizer("lion", "pytorch-optimizer"),
        "schedule_free": optimizer("schedule_free_adamw", "schedule-free"),
    },
    "loss": {"sft": (["sft"], {}), "dft": (["dft"], {})},
    "packing": {"off": OFF, "on": (["packing"], {"packing": {"length": 96}})},
    "neftune": {"off": OFF, "on": (["neftune"], {})},
    "activations": {
        "off": OFF,
        "full": (["activations"], {}),
        "reentrant": (["activations"], {"activations": {"policy": 1, "reentrant": True}}),
        "offload": (["activations"], {"activations": {"offload": "cpu", "offload_min_bytes": 0}}),
        "auto": (["activations"], {"activations": {"policy": "auto", "memory_gib": 2}}),
    },
    "head": {
        "whole": OFF,
        "chunked": (["chunked-cross-entropy"], {"chunked-cross-entropy": {"chunk": 8}}),
        "cce": (["cce"], {"cce": {"logits_gib": 1e-5}}),
    },
    "kernels": {
        "none": OFF,
        "fused": (["fused"], {}),
        "attention": (["attention"], {"attention": {"implementation": "pegbox"}}),
        "both": (["fused", "attention"], {"fused": {"rope": True}, "attention": {"implementation": "pegbox"}}),
    },
    "observers": {
        "none": OFF,
        "all": (
            ["early-stopping", "samples", "trackers"],
            {"samples": {"rows": 1, "max_new_tokens": 3, "show": False}, "trackers": {"tensorboard": {}}},
        ),
    },
}


def some(factor: str, *choices: str) -> Mapping[str, Choice]:
    return {choice: FACTORS[factor][choice] for choice in choices}


SLOW: Factors = {
    **FACTORS,
    "activations": some("activations", "off", "full", "auto"),
    "head": some("head", "whole", "cce"),
    "kernels": some("kernels", "none", "both"),
    "observers": some("observers", "none"),
    "optimizer": {"adamw": FACTORS["optimizer"]["adamw"], "torchao": optimizer("adamw_torchao_8bit", "torchao-optim")},
    "compile": {
        "off": OFF,
        "layers": (["compile"], {"compile": {"backend": "aot_eager"}}),
        "model": (["compile"], {"compile": {"backend": "eager", "scope": "model"}}),
    },
}
CANNOT_BE = {
    frozenset({("weights", "relora"), ("optimizer", "schedule_free")}): "which is schedule-free",
    frozenset({("activations", "auto"), ("compile", "layers")}): "'compile' compiles layers",
    frozenset({("activations", "auto"), ("compile", "model")}): "'compile' compiles",
}


def pairs(run: Run) -> set[frozenset[tuple[str, str]]]:
    return {frozenset(pair) for pair in combinations(run.items(), 2)}


def covering(factors: Factors) -> Iterator[Run]:
    """Few runs in which every pair of choices of two factors occurs, but for those that cannot be; greedy."""
    wanted = {
        frozenset({(one, first), (other, second)})
        for one, other in combinations(factors, 2)
        for first, second in product(factors[one], factors[other])
    } - CANNOT_BE.keys()
    while wanted:
        run = dict(sorted(min(wanted, key=sorted)))
        for factor in factors:
            if factor in run:
                continue
            options = [{**run, factor: choice} for choice in factors[factor]]
            possible = [option for option in options if not pairs(option) & CANNOT_BE.keys()]
            run = max(possible, key=lambda option: len(pairs(option) & wanted))
        wanted -= pairs(run)
        yield run


def config(run: Run, factors: Factors, base: Path, rows: Path, output: Path, *, backwards: bool) -> dict[str, Any]:
    chosen = [factors[factor][choice] for factor, choice in run.items()]
    plugins = ["hf", "data", *(plugin for names, _ in chosen for plugin in names), "trainer"]
    sections = {name: section for _, given in chosen for name, section in given.items()}
    return {
        "model": {"name": str(base)},
        "plugins": plugins[::-1] if backwards else plugins,
        "data": {"train": [{"path": str(rows)}], "eval_rows": 4},
        "trainer": {
            "max_steps": STEPS,
            "micro_batch": 2,
            "log_every": 1,
            "eval_every": 2,
            "save_every": SAVED,
            "progress": "none",
        },
        "output": str(output),
        **sections,
    }


def losses(output: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(line["kind"], line["step"]): line.get("loss", line.get("eval_loss")) for line in lines}


def check(run: Run, factors: Factors, base: Path, rows: Path, output: Path, *, backwards: bool) -> None:
    made = config(run, factors, base, rows, output, backwards=backwards)
    execute(compose(made))
    first = losses(output)
    assert first.keys() >= {("train", step) for step in range(1, STEPS + 1)}, run
    assert all(isfinite(loss) for loss in first.values()), run
    rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    execute(compose({**made, "resume": "auto"}))
    assert losses(output) == first, f"resumed at step {SAVED}, other losses: {run}"
    compose(yaml.safe_load((output / "config.yaml").read_text(encoding="utf-8")))


def check_all(factors: Factors, base: Path, rows: Path, folder: Path) -> None:
    for number, run in enumerate(covering(factors)):
        try:
            check(run, factors, base, rows, folder / str(number), backwards=bool(number % 2))
        except Exception as error:
            error.add_note(f"in the run {run}, plugins {'backwards' if number % 2 else 'in order'}")
            raise


def test_all_pairs_of_settings_train_and_resume_to_the_same_bits(base: Path, rows: Path, tmp_path: Path) -> None:
    check_all(FACTORS, base, rows, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_pairs_with_compiled_parts_train_and_resume(base: Path, rows: Path, tmp_path: Path) -> None:
    check_all(SLOW, base, rows, tmp_path)


@pytest.mark.parametrize("pair", CANNOT_BE, ids=lambda pair: " and ".join(choice for _, choice in sorted(pair)))
def test_pairs_that_cannot_be_stop_before_the_first_step(
    pair: frozenset, base: Path, rows: Path, tmp_path: Path
) -> None:
    factors = {**FACTORS, "compile": SLOW["compile"]}
    run = {factor: next(iter(choices)) for factor, choices in factors.items()} | dict(pair)
    with pytest.raises(PegboxError, match=CANNOT_BE[pair]):
        execute(compose(config(run, factors, base, rows, tmp_path / "run", backwards=False)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
