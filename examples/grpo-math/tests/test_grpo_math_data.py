"""The sums that ship with the example are right and what prepare.py makes; its configs differ in what they say."""

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
SUM = re.compile(r"(\d) ([-+]) (\d) =")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"grpo_math_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(row: dict[str, str]) -> str:
    return row["prompt"].splitlines()[-1]


def test_the_files_are_what_prepare_makes():
    pytest.importorskip("reasoning_gym")
    prepare = load("prepare")
    for name, pairs in prepare.build().items():
        text = (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
        assert text == "".join(prepare.lines(pairs))


@pytest.mark.parametrize(("name", "number"), [("train", 512), ("eval", 64)])
def test_every_answer_is_the_sum_of_the_last_line_and_every_example_is_solved_rightly(name, number):
    assert len(rows(name)) == number
    for row in rows(name):
        *solved, last = row["prompt"].splitlines()
        for line, answer in [*(line.rsplit(" ", 1) for line in solved), (last, row["answer"])]:
            left, sign, right = SUM.fullmatch(line).groups()
            assert int(answer) == int(left) + (1 if sign == "+" else -1) * int(right)
        assert row["prompt"].endswith(" =")


def test_no_held_out_sum_is_trained_asked_twice_or_solved_in_the_prompt():
    train, held_out = ([asked(row) for row in rows(name)] for name in SPLITS)
    assert len(set(held_out)) == len(held_out)
    assert not set(train) & set(held_out)
    solved = {f"{line.rsplit(' ', 1)[0]}" for line in load("prepare").SOLVED}
    assert not solved & {*train, *held_out}


def test_vllm_is_a_change_of_one_plugin():
    ours, theirs = (compose(HERE / name).config.run.plugins for name in ("config.yaml", "config-vllm.yaml"))
    assert tuple(name.replace("rollout-vllm", "rollout-hf") for name in theirs) == tuple(ours)


def test_the_reward_model_gives_the_reward_and_the_comparison_only_watches():
    planned = compose(HERE / "config-reward-model.yaml")
    assert planned.config.run.rewards == {"reward-model/sums": 1.0, "exact": 0.0}
    assert {i.plugin for i in planned.kernel.implementations("score_rollouts")} == {"reward-functions", "reward-model"}
    assert planned.config.path("../../runs/reward-model") == HERE.parent.parent / "runs" / "reward-model"


def readme_runs() -> list[list[str]]:
    """Config and overrides of every run that the README shows."""
    text = (HERE / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in re.findall(r"^pegbox run (examples/.*)$", text, re.M)]


@pytest.mark.parametrize("arguments", readme_runs(), ids=" ".join)
def test_every_run_of_the_readme_composes(arguments):
    config, *overrides = arguments
    assert compose(HERE.parent.parent / config, overrides).config.run.output


def test_every_step_of_an_epoch_has_new_prompts():
    planned = compose(HERE / "config.yaml")
    text = (HERE / "config.yaml").read_text(encoding="utf-8")
    steps, batch = (int(re.search(rf"^  {key}: (\d+)", text, re.M)[1]) for key in ("max_steps", "batch"))
    assert steps * batch == len(rows("train"))
    assert planned.kernel.owners("generate_rollouts") == {"": "rollout-hf"}


def test_the_curve_shows_means_of_eight_steps_and_the_held_out_rows(tmp_path, capsys):
    curve = load("curve")
    lines = [{"kind": "eval", "step": 0, "eval_rewards/exact/mean": 0.5}]
    lines += [
        {"kind": "train", "step": step, "rewards/exact/mean": 0.25 if step <= 8 else 0.75, "entropy": 1.0}
        for step in range(1, 13)
    ]
    lines.append({"kind": "eval", "step": 12, "eval_rewards/exact/mean": 0.875})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert curve.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in shown if "steps" in line] == [["1-8", "25.0%"], ["9-12", "75.0%"]]
    assert [line.count("#") for line in shown if "steps" in line] == [10, 30]
    assert [line.split()[-2:] for line in shown if "after" in line] == [["0", "50.0%"], ["12", "87.5%"]]
    assert curve.main([str(tmp_path / "none")]) == 2
