"""The built-in rewards against cases worked out by hand, and against the libraries that they ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pegbox.config import validate
from pegbox.errors import ConfigError
from pegbox.plan import compose
from pegbox_reward_functions import RewardFunctionsPlugin
from pegbox_reward_functions.builtin.length import soft_overlong
from pegbox_reward_functions.gym_rows import GymRowsOptions, GymSource, Place
from pegbox_reward_functions.opening import declared
from reward_texts import context, rollouts, scored


def opened(name: str, **options: Any) -> Any:
    item = next(item for item in RewardFunctionsPlugin().register_items() if (item.kind, item.name) == ("reward", name))
    reward = declared(item.target)
    layer = compose({"model": {"name": "x"}}).config.layer
    return reward.open(validate(reward.options, options, layer, ()))


@pytest.mark.parametrize(
    ("options", "said", "answer", "value"),
    [
        ({}, " 42 ", "42", 1.0),
        ({}, "42.", "42", 0.0),
        ({}, "42", 42, 1.0),
        ({"ignore": []}, " 42", "42", 0.0),
        ({"ignore": ["case", "punctuation", "articles", "space"]}, "The  cat!", "cat", 1.0),
        ({"part": "last_number"}, "2 + 3 makes 1,005.", "1005", 1.0),
        ({"part": "last_line"}, "so\n\n 7 \n", "7", 1.0),
        ({"tag": "answer"}, "7 <answer>8</answer> <answer> 9 </answer>", "9", 1.0),
        ({"tag": "answer"}, "9", "9", 0.0),
        ({}, "grey", ["gray", "grey"], 1.0),
        ({}, "x", None, None),
        ({"right": 2.0, "wrong": -1.0}, "x", "y", -1.0),
    ],
)
def test_exact(options: dict[str, Any], said: str, answer: Any, value: float | None) -> None:
    assert opened("exact", **options)([said], answer=[answer]) == [value]


@pytest.mark.parametrize(
    ("options", "said", "answer", "value"),
    [
        ({}, r"So it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        ({}, "The answer is $x = 3$", "3", 1.0),
        ({}, "She has 18 dollars", "18", 1.0),
        ({}, "She has 17 dollars", "18", 0.0),
        ({}, r"$\frac{3}{4}$", "3/4", 1.0),
        ({}, r"$(x+1)^2$", "$x^2+2x+1$", 1.0),
        ({}, "nothing here", "18", 0.0),
        ({"boxed": True}, "18", "18", 0.0),
        ({"boxed": True}, r"\boxed{18}", "18", 1.0),
        ({"tag": "answer"}, "17 <answer>18</answer> 19", "18", 1.0),
        ({}, "18", None, None),
        ({}, "18", 18, 1.0),
    ],
)
def test_math(options: dict[str, Any], said: str, answer: Any, value: float | None) -> None:
    assert opened("math", **options)([said], answer=[answer]) == [value]


def test_math_works_in_a_worker_where_it_sets_an_alarm(tmp_path: Path) -> None:
    batch = rollouts(({"prompt": "a", "answer": "1/3"}, [r"\boxed{\frac13}", "0.3"]))
    assert scored(context(tmp_path, "math"), batch) == {"math": (1.0, 0.0)}


@pytest.mark.parametrize(
    ("options", "said", "value"),
    [
        ({}, "<think>a</think>\n<answer>b</answer>\n", 1.0),
        ({}, "<think>a</think> so <answer>b</answer>", 0.0),
        ({}, "<answer>b</answer><think>a</think>", 0.0),
        ({}, "<think>a<think>b</think><answer>c</answer>", 0.0),
        ({"partial": True}, "<answer>b</answer>", 0.5),
        ({"partial": True}, "<answer>b</answer><think>a</think>", 0.5),
        ({"partial": True}, "<think>a</think><answer>b</answer>", 1.0),
        ({"pattern": r"\d+"}, "123", 1.0),
        ({"pattern": r"\d+"}, "123 ", 0.0),
        ({"pattern": "a.b"}, "a\nb", 1.0),
    ],
)
def test_format(options: dict[str, Any], said: str, value: float) -> None:
    assert opened("format", **options)([said]) == [value]
    assert opened("format", **options)([[{"role": "assistant", "content": said}]]) == [value]


def test_length_is_trls_soft_overlong_punishment() -> None:
    from trl.rewards import get_soft_overlong_punishment

    lengths = (1, 7, 8, 9, 10, 11)
    ids = [[0] * count for count in lengths]
    theirs = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=3)(completion_ids=ids)
    assert opened("length", max_tokens=10, soft_tokens=3)(ids) == theirs
    assert [soft_overlong(count, 10, 3) for count in lengths] == theirs
    assert opened("length", target_tokens=8)([[0] * 8, [0] * 4, [0] * 10, [0] * 20]) == [0.0, -0.5, -0.25, -1.0]


@pytest.mark.parametrize(
    ("reward", "options", "says"),
    [
        ("length", {}, "set one of max_tokens"),
        ("length", {"max_tokens": 5, "soft_tokens": 6}, "is more than max_tokens"),
        ("length", {"target_tokens": 5, "soft_tokens": 2}, "without max_tokens"),
        ("format", {"pattern": "("}, "no regular expression"),
        ("format", {"pattern": "a", "partial": True}, "remove one"),
        ("format", {"tags": []}, "there is no form"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(reward: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        opened(reward, **options)


def rows(**options: Any) -> list[dict[str, Any]]:
    (part,) = GymSource().parts(None, GymRowsOptions(**options), False)
    return [dict(entry.row or {}) for entry in part.read()]


@pytest.mark.parametrize("task", ["chain_sum", "basic_arithmetic", "spell_backward"])
def test_tasks_of_reasoning_gym_judge_the_answers_of_their_rows(task: str) -> None:
    made = rows(task=task, rows=4, seed=3)
    entries = [row["entry"] for row in made]
    score = opened("reasoning-gym")
    assert score([f" {row['answer']}\n" for row in made], entry=entries) == [1.0] * 4
    assert max(score(["?"] * 4, entry=entries)) < 0.1
    tagged = opened("reasoning-gym", tag="answer")
    assert tagged([f"<answer>{row['answer']}</answer>" for row in made], entry=entries) == [1.0] * 4
    assert tagged([row["answer"] for row in made], entry=entries) == [0.0] * 4


def test_rows_of_reasoning_gym_are_a_function_of_task_and_seed() -> None:
    import reasoning_gym

    made = rows(task="chain_sum", rows=5, seed=2, settings={"max_terms": 2, "max_digits": 1}, instruction="Be brief.")
    theirs = reasoning_gym.create_dataset("chain_sum", size=5, seed=2, max_terms=2, max_digits=1)
    assert [row["answer"] for row in made] == [entry["answer"] for entry in theirs]
    assert [row["prompt"] for row in made] == [f"{entry['question']}\n\nBe brief." for entry in theirs]
    assert [json.loads(row["entry"])["answer"] for row in made] == [row["answer"] for row in made]
    assert rows(task="chain_sum", rows=5, seed=1) != made
    (part,) = GymSource().parts(None, GymRowsOptions(task="chain_sum", rows=5, seed=2), False)
    whole = list(part.read())
    assert list(part.read(Place(3, 3))) == whole[3:]
    assert whole[2].behind == Place(3, 3)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"task": "chain_sums"}, "Did you mean 'chain_sum'"),
        ({"task": "chain_sum", "settings": {"x": 1}}, "does not take"),
    ],
)
def test_tasks_that_reasoning_gym_does_not_have_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rows(**options)
