"""A user's function is found, called as TRL calls it, and its mistakes are told with prompt and completion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pegbox import hooks
from pegbox.errors import ConfigError, RunError
from pegbox.events import RunBegins
from pegbox.rollouts import RolloutBatch
from pegbox.testing.tiny import TinyExamples
from reward_texts import context, rollouts, scored

FUNCTIONS = """
import asyncio, signal, os, time

def seen(prompts, completions, completion_ids, answer, **more):
    assert sorted(more) == ["extra"], more
    return [float(len(ids)) + (a == c) for c, ids, a in zip(completions, completion_ids, answer)]

def plain(completions):
    return [len(c) if c != "skip" else None for c in completions]

def chats(prompts, completions):
    assert all(p == [{"role": "user", "content": "hi"}] for p in prompts), prompts
    return [float(len(c[0]["content"])) * (c[0]["role"] == "assistant") for c in completions]

async def later(completions, **_):
    await asyncio.sleep(0.001)
    return [1.0 for _ in completions]

def alarmed(completions):
    def ring(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        return [2.0] * len(completions)
    return [0.0] * len(completions)

def raises(prompts, completions):
    return [1.0 / (c != "bad") if c != "worse" else int("x") for c in completions]

def short(completions): return [1.0]
def nan(completions): return [float("nan") if c == "bad" else 0.0 for c in completions]
def words(completions): return "no"
def dies(completions): os._exit(3)
def hangs(completions):
    while any(c == "bad" for c in completions): time.sleep(0.01)
    return [1.0] * len(completions)
def whose(completions):
    time.sleep(0.1)
    return [float(os.getpid())] * len(completions)
def trains(completions, trainer_state): return [0.0] * len(completions)
def weighs(completions, weight, margin=0.0): return [float(w) for w in weight]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS, encoding="utf-8")
    return tmp_path


BATCH = rollouts(
    ({"prompt": "one?", "answer": "1", "extra": [1]}, ["1", "no"]), ({"prompt": "two?", "answer": "2"}, ["22", "skip"])
)


def test_functions_are_called_as_trl_calls_them(folder: Path) -> None:
    batch = rollouts(
        ({"prompt": "one?", "answer": "1", "extra": 0}, ["1", "no"]),
        ({"prompt": "two?", "answer": "skip", "extra": 0}, ["22", "skip"]),
    )
    values = scored(context(folder, "./mine.py:seen", "./mine.py:plain", "mine.later", "mine:alarmed"), batch)
    assert values == {
        "seen": (3.0, 3.0, 3.0, 6.0),
        "plain": (1.0, 2.0, 2.0, None),
        "later": (1.0,) * 4,
        "alarmed": (2.0,) * 4,
    }


def test_names_of_scores_are_told_without_completions(folder: Path) -> None:
    """A weight for a name that nobody gives can then be refused before anything is sampled."""
    ctx = context(folder, "./mine.py:seen", {"use": "length", "name": "brief", "options": {"max_tokens": 4}})
    assert scored(ctx, RolloutBatch(rollouts=(), samples=2)) == {"seen": (), "brief": ()}


def test_conversational_prompts_give_conversational_completions(folder: Path) -> None:
    hi = {"role": "user", "content": "hi"}
    begun = {"prompt": [hi, {"role": "assistant", "content": "Well, "}]}
    batch = rollouts(({"prompt": [hi]}, ["ab", "c"]), (begun, ["ab", "c"]))
    assert scored(context(folder, "./mine.py:chats"), batch) == {"chats": (2.0, 1.0, 8.0, 7.0)}


def test_a_function_may_lie_in_the_working_directory(
    folder: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(folder)
    assert scored(context(elsewhere, "./mine.py:plain", {"use": "mine.plain", "name": "again"}), BATCH) == {
        "plain": (1.0, 2.0, 2.0, None),
        "again": (1.0, 2.0, 2.0, None),
    }


def test_prompts_are_shared_by_the_workers(folder: Path) -> None:
    batch = rollouts(*[({"prompt": f"{at}?"}, ["a", "b"]) for at in range(12)])
    ctx = context(folder, "./mine.py:whose", workers=2)
    values = scored(ctx, batch)["whose"]
    assert len(set(values)) == 2
    assert os.getpid() not in values
    assert values[::2] == values[1::2], "one prompt is not split"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (
            "raises",
            r"(?s)'raises' raised ZeroDivisionError.*completion 'bad' of the prompt 'two\?'.*"
            r"\(most recent call last\):\n  File \S+mine\.py\", line \d+, in raises",
        ),
        ("short", r"returned 1 values for 2 completions of the prompt 'one\?'"),
        ("nan", r"'nan' is nan for the completion 'bad' of the prompt 'two\?'"),
        ("words", "returned 'no', which is no list"),
        ("dies", r"ended its process with code 3.*'one\?'"),
    ],
)
def test_what_goes_wrong_in_a_function_is_told(folder: Path, function: str, says: str) -> None:
    batch = rollouts(({"prompt": "one?"}, ["good", "fine"]), ({"prompt": "two?"}, ["good", "bad"]))
    with pytest.raises(RunError, match=says):
        scored(context(folder, f"./mine.py:{function}"), batch)


def test_a_function_that_hangs_stops_the_run_or_does_not_apply(folder: Path) -> None:
    batch = rollouts(({"prompt": "one?"}, ["good", "fine"]), ({"prompt": "two?"}, ["good", "bad"]))
    with pytest.raises(RunError, match=r"'hangs' took more than 0\.3 s for the completions of the prompt 'two\?'"):
        scored(context(folder, "./mine.py:hangs", timeout_s=0.3), batch)
    ctx = context(folder, "./mine.py:hangs", "./mine.py:plain", timeout_s=0.3, on_timeout="none")
    assert scored(ctx, batch) == {"hangs": (1.0, 1.0, None, None), "plain": (4.0, 4.0, 4.0, 3.0)}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("./mine.py:plane", "Did you mean 'plain'"),
        ("./absent.py:plain", r"absent\.py of a reward function does not exist"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("exakt", "Did you mean 'exact'"),
        ({"use": "./mine.py:plain", "options": {"a": 1}}, "it is a function"),
        ({"use": "exact", "options": {"answr": "x"}}, r"(?s)unknown key 'answr'.*answer"),
        ("./broken.py:f", r"(?s)broken\.py.*cannot be imported: ValueError: oh\nIts code .*broken\.py\", line 1, in"),
        ("./unwritten.py:f", r"(?s)cannot be imported: SyntaxError: expected ':'\nIts code .*unwritten\.py\", line 1"),
    ],
)
def test_what_cannot_be_found_is_an_error_before_anything_is_read(folder: Path, function: Any, says: str) -> None:
    (folder / "broken.py").write_text("raise ValueError('oh')", encoding="utf-8")
    (folder / "unwritten.py").write_text("def f(completions)\n    return []", encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        context(folder, function).notify(RunBegins())


def test_two_scores_of_one_name_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="two rewards are named 'plain'"):
        context(folder, "./mine.py:plain", "mine.plain").notify(RunBegins())


class Rows:
    """Owns the dataset of a test."""

    def __init__(self, *columns: str) -> None:
        self._columns = columns

    @hooks.hookimpl
    def build_dataset(self, split: str) -> Any:
        from dataclasses import replace

        columns = self._columns

        class Kept(TinyExamples):
            def __getitem__(self, index: int) -> Any:
                return replace(super().__getitem__(index), columns=dict.fromkeys(columns, "1"))

        return Kept(["a", "b"])


def test_what_only_trls_trainer_passes_is_refused(folder: Path) -> None:
    from pegbox.plan import compose
    from pegbox.testing.tiny import tiny_processor

    section = {"functions": [f"{folder}/mine.py:trains"]}
    config = {"model": {"name": "x"}, "plugins": ["rows", "reward-functions"], "reward-functions": section}
    ctx = compose(config, instances={"rows": Rows("answer")})
    with pytest.raises(ConfigError, match=r"(?s)requires 'trainer_state'.*no such trainer.*trainer_state=None"):
        ctx.call(hooks.build_dataset, ctx, tiny_processor(), "train")


@pytest.mark.parametrize(
    ("function", "columns", "missing"),
    [
        ("./mine.py:weighs", ("answer",), "weight"),
        ("./mine.py:weighs", ("weight",), None),
        ("exact", ("label",), "answer"),
        ({"use": "exact", "options": {"answer": "label"}}, ("label",), None),
        ("code", ("label",), "tests"),
    ],
)
def test_a_column_that_the_rows_lack_is_named_before_the_model_is_loaded(
    folder: Path, function: Any, columns: tuple[str, ...], missing: str | None
) -> None:
    import json

    from pegbox.plan import compose
    from pegbox.testing.tiny import tiny_processor

    path = folder / "run.yaml"
    section = {"functions": [function]}
    config = {"model": {"name": "x"}, "plugins": ["rows", "reward-functions"], "reward-functions": section}
    path.write_text(json.dumps(config), encoding="utf-8")
    ctx = compose(path, instances={"rows": Rows(*columns)})
    if missing is None:
        assert ctx.call(hooks.build_dataset, ctx, tiny_processor(), "train") is not None
        return
    with pytest.raises(ConfigError, match=rf"(?s)requires '{missing}'.*data\.columns: \[.*{missing}"):
        ctx.call(hooks.build_dataset, ctx, tiny_processor(), "train")
