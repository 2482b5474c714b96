"""The pairs that ship with the example are what prepare.py makes: one right answer, one wrong."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from pegbox.plan import compose

HERE = Path(__file__).parent.parent
SPLITS = ("train", "eval")


def prepare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_judgements", HERE / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(row: dict[str, str]) -> str:
    return row["prompt"].splitlines()[-1]


@pytest.mark.parametrize("name", SPLITS)
def test_the_files_are_what_prepare_makes(name):
    text = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text == "".join(prepare().build(name))


@pytest.mark.parametrize("name", SPLITS)
def test_the_chosen_answer_is_right_and_the_rejected_one_is_wrong(name):
    for row in rows(name):
        left, sign, right, _ = asked(row).split()
        answer = int(left) + (1 if sign == "+" else -1) * int(right)
        assert row["chosen"] == f" {answer}\n"
        assert row["rejected"] == f" {int(row['rejected'])}\n"
        assert row["rejected"] != row["chosen"]


def test_no_held_out_sum_is_trained_and_no_pair_is_there_twice():
    assert not {asked(row) for row in rows("train")} & {asked(row) for row in rows("eval")}
    for name in SPLITS:
        assert max(Counter(tuple(row.values()) for row in rows(name)).values()) == 1


def test_the_answer_alone_does_not_tell_which_is_right():
    """Whoever knows only how often a number is right and wrong is wrong in a good part of the pairs."""
    train, held_out = (rows(name) for name in SPLITS)
    right, wrong = (Counter(row[name] for row in train) for name in ("chosen", "rejected"))

    def share(answer: str) -> float:
        return (right[answer] + 1) / (right[answer] + wrong[answer] + 2)

    won = sum(share(row["chosen"]) > share(row["rejected"]) for row in held_out) / len(held_out)
    assert won < 0.65


def test_the_config_composes_and_its_template_adds_nothing():
    from jinja2 import Environment

    assert compose(HERE / "config.yaml").kernel.owners("build_loss") == {"": "reward"}
    template = Environment(autoescape=False).from_string((HERE / "plain.jinja").read_text(encoding="utf-8"))
    row = rows("train")[0]
    turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
    for made in (turns[:1], turns):
        for asks in (False, True):
            text = "".join(turn["content"] for turn in made)
            assert template.render(messages=made, add_generation_prompt=asks) == text


def readme_runs() -> list[list[str]]:
    """Config and overrides of every run that the README shows."""
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"^pegbox run (examples/.*)$", text, re.M)]


@pytest.mark.parametrize("arguments", readme_runs(), ids=" ".join)
def test_every_run_of_the_readme_composes(arguments):
    config, *overrides = arguments
    assert compose(HERE.parent.parent / config, overrides).config.run.output
