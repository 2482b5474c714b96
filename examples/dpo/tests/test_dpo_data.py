"""The pairs that ship with the example are what prepare.py makes of their answers, and its commands compose."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from pegbox.plan import compose

HERE = Path(__file__).parent.parent
SPLITS = ("train", "eval")
LOSSES = {"dpo", "orpo", "simpo", "kto"}


def rows(folder: Path, name: str) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_pairs", HERE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair(request: str, command: str, said: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": request}],
        "chosen": [{"role": "assistant", "content": command}],
        "rejected": [{"role": "assistant", "content": said}],
    }


def test_the_files_are_what_prepare_makes_of_the_answers_in_them():
    module = prepare()
    assert module.build(module.kept()) == {
        split: (HERE / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for split in SPLITS
    }


def test_every_chosen_answer_is_the_quickstarts_command_for_the_request():
    verified = {json.dumps(row["messages"]) for row in rows(HERE.parent / "quickstart", "train")}
    for split in SPLITS:
        for row in rows(HERE, split):
            assert json.dumps([*row["prompt"], *row["chosen"]]) in verified


def test_no_request_is_in_both_files_or_held_out_in_the_quickstart():
    asked = {split: {row["prompt"][0]["content"] for row in rows(HERE, split)} for split in SPLITS}
    held_out = {row["messages"][0]["content"] for row in rows(HERE.parent / "quickstart", "eval")}
    assert not asked["train"] & asked["eval"]
    assert not (asked["train"] | asked["eval"]) & held_out


@pytest.mark.parametrize("said", ["", "ls", "see https://example.invalid/page", "write to me@example.invalid"])
def test_a_pair_without_a_preference_or_with_an_address_is_left_out(said):
    built = prepare().build([pair("list files", "ls", said), pair("show the date", "date", "It is late.")])
    assert [json.loads(line)["prompt"][0]["content"] for line in [*built["train"], *built["eval"]]] == ["show the date"]


def test_both_commands_of_a_request_are_in_the_same_file():
    built = prepare().build([pair(f"list folder {i // 2}", f"ls {i}", "No.") for i in range(80)])
    asked = {split: [json.loads(line)["prompt"][0]["content"] for line in built[split]] for split in SPLITS}
    assert len(asked["train"]) + len(asked["eval"]) == 80
    assert asked["eval"]
    assert all(asked[split].count(request) == 2 for split in SPLITS for request in asked[split])


def test_data_md_says_how_many_pairs_there_are():
    text = (HERE / "DATA.md").read_text(encoding="utf-8")
    assert f"{len(rows(HERE, 'train'))} in `data/train.jsonl`, {len(rows(HERE, 'eval'))} in `data/eval.jsonl`" in text


def readme_runs() -> list[list[str]]:
    """Overrides of every command of the README that runs the example."""
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        shlex.split(line, comments=True)
        for line in re.findall(r"^pegbox run examples/dpo/config\.yaml(.*)$", text, re.M)
    ]


@pytest.mark.parametrize("overrides", readme_runs(), ids=" ".join)
def test_every_run_of_the_readme_composes(overrides):
    planned = compose(HERE / "config.yaml", overrides)
    (owner,) = planned.kernel.owners("build_loss").values()
    assert owner in (["weighed-losses"] if planned.config.run.loss else LOSSES & set(planned.config.run.plugins))


def test_the_readme_shows_each_variant_it_speaks_of():
    written = " ".join(word for overrides in readme_runs() for word in overrides)
    assert all(name in written for name in ("orpo", "simpo", "kto", "unpair", "packing", "sft: 0.1"))
