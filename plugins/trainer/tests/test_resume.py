"""A run that was stopped in any way and resumed is the run that never stopped, to the bit."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from killed_runs import KEYS, STEPS, Killer
from peer_runs import CtrlC
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.events import Signal
from pegbox.hooks import hookimpl
from pegbox_trainer.interruption import ECHO_S
from safetensors.torch import load_file
from tiny_runs import assert_same_run, assert_same_tree, checkpoint, in_subprocess, records, run


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of runs that were killed, and what the killing program printed."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, in_subprocess(str(Path(__file__).with_name("killed_runs.py")), str(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that never stopped."""
    from tiny_runs import tiny_config

    folder = tmp_path_factory.mktemp("whole") / "run"
    run(tiny_config(folder, plugins=["killer"], **KEYS), killer=Killer())
    return folder


def resumed(folder: Path, **keys: Any) -> Path:
    """Resume a killed run in this process until it ends."""
    from tiny_runs import tiny_config

    made = tiny_config(folder, plugins=["killer"], resume="auto", **{**KEYS, **keys})
    outcome = run(made, killer=Killer())
    assert (outcome.reason, outcome.step) == ("finished", STEPS)
    return folder


@pytest.mark.parametrize(("name", "complete"), [("at_step", [5]), ("in_save", [5]), ("in_first_save", [])])
def test_killed_and_resumed_is_the_run_that_never_stopped(
    killed: tuple[Path, str], whole: Path, name: str, complete: list[int]
) -> None:
    folder = killed[0] / name
    steps = [int(path.name.removeprefix("step-")) for path in sorted((folder / "checkpoints").glob("step-*"))]
    assert steps == complete
    assert records(folder)[-1]["step"] > (complete or [0])[-1], "something is to be cut back"
    resumed(folder)
    assert_same_run(folder, whole, STEPS)
    assert not list((folder / "checkpoints").glob(".tmp-*")), "what was half-written is gone"
    assert [record["step"] for record in records(folder, "eval")] == [4, 8, 12, 16]


def test_killed_at_any_moment_leaves_a_readable_latest_checkpoint(killed: tuple[Path, str], whole: Path) -> None:
    folder, printed = killed[0] / "again_and_again", killed[1]
    kills = int(re.findall(r"kills=(\d+)", printed)[0])
    assert kills >= 1, "each kill was followed by reading every checkpoint, and by going on from the last"
    assert records(folder) == records(whole)
    ours, theirs = (load_file(checkpoint(path, STEPS) / "model.safetensors") for path in (folder, whole))
    assert_same_tree(ours, theirs)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_goes_on_as_if_nothing_had_been(
    config: Any, tmp_path: Path, whole: Path, number: signal.Signals
) -> None:
    class Stop:
        @hookimpl
        def on_event(self, event: Any) -> None:
            if type(event).__name__ == "Stepped" and event.step == 7:
                os.kill(os.getpid(), number)

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    plugins = ["killer", "stop"]
    outcome = run(config(plugins=plugins, **KEYS), killer=Killer(), stop=Stop())
    assert (outcome.reason, outcome.step, outcome.checkpoint.step) == ("interrupted", 7, 7)
    assert outcome.checkpoint.path == checkpoint(tmp_path / "run", 7)
    assert json.loads((outcome.checkpoint.path / "meta.json").read_text())["step"] == 7
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    resumed(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole, STEPS)


class Impatient:
    """Sends SIGTERM and Ctrl-C twice each, the second time after a while."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s

    @hookimpl
    def on_event(self, event: Any) -> None:
        if type(event).__name__ == "Stepped" and event.step == 2:
            for wait_s in (0.0, self.wait_s):
                time.sleep(wait_s)
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)


def test_a_second_ctrl_c_does_not_wait(config: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(config(plugins=["impatient"], max_steps=5), impatient=Impatient(ECHO_S + 0.1))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_echo_of_a_ctrl_c_is_no_second_one(config: Any) -> None:
    outcome = run(config(plugins=["impatient"], max_steps=5), impatient=Impatient(0.05))
    assert (outcome.reason, outcome.checkpoint.step) == ("interrupted", 2)


def test_resuming_a_finished_run_changes_nothing(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "eval_every": 4, "tiny": {"eval_rows": 5}}
    first = run(config(**keys))
    before = records(tmp_path / "run")
    again = run(config(resume="auto", **keys))
    assert (again.reason, again.step, again.metrics) == ("finished", 6, first.metrics)
    assert records(tmp_path / "run") == before


def test_going_back_to_an_older_checkpoint_sets_later_ones_aside(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 9, "save_every": 3, "keep": None, "plugins": ["stop"]}
    run(config(**keys), stop=CtrlC(0, 0))
    run(config(output="whole", **keys), stop=CtrlC(0, 0))
    outcome = run(config(resume="step-00000003", **keys), stop=CtrlC(4, 0))
    folder = tmp_path / "run" / "checkpoints"
    assert (outcome.reason, outcome.step) == ("interrupted", 4)
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-00000003", "step-00000004"]
    aside = sorted(path.name for path in (folder / "superseded").iterdir())
    assert aside == ["step-00000006", "step-00000009"]
    run(config(resume="auto", **keys), stop=CtrlC(0, 0))
    assert_same_run(tmp_path / "run", tmp_path / "whole", 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 3}, "takes 8 rows over all processes, one of this run 6"),
        ({"shuffle": False}, "trainer.shuffle was True, is now False"),
        ({"tiny": {"rows": 20}}, "tiny_llama.rows was 48, is now 20"),
        ({"tiny": {"longest": 9}}, "tiny_llama.longest was 24, is now 9"),
    ],
)
def test_resuming_at_another_place_in_the_data_is_an_error(config: Any, change: Any, message: str) -> None:
    run(config(max_steps=3, micro_batch=4, accumulation=2))
    with pytest.raises((RunError, ConfigError), match=message):
        run(config(**{"max_steps": 6, "micro_batch": 4, "accumulation": 2, "resume": "auto", **change}))


def test_a_stopped_run_goes_on_when_more_steps_are_asked_for(config: Any, tmp_path: Path) -> None:
    flat = {"schedule": "constant"}
    run(config(max_steps=4, adamw=flat))
    run(config(max_steps=7, adamw=flat, resume="auto"))
    run(config(output="whole", max_steps=7, adamw=flat))
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert_same_tree(ours, theirs)


def test_a_finished_run_that_is_made_longer_takes_the_rates_of_the_longer_run(config: Any, tmp_path: Path) -> None:
    falling = {"schedule": "linear"}
    run(config(max_steps=4, adamw=falling))
    run(config(max_steps=8, adamw=falling, resume="auto"))
    run(config(output="whole", max_steps=8, adamw=falling))
    ours, theirs = ([one["learning_rate"] for one in records(tmp_path / name)] for name in ("run", "whole"))
    assert ours[4:] == theirs[4:]
    assert ours[4] > 0


def test_an_output_that_holds_a_run_is_refused_without_resume(config: Any) -> None:
    run(config(max_steps=1))
    with pytest.raises(UserError, match="already holds a run"):
        run(config(max_steps=1))


def test_an_observer_stops_a_run_which_can_be_resumed(config: Any, tmp_path: Path) -> None:
    class Stopper:
        @hookimpl
        def on_event(self, event: Any) -> Signal | None:
            return Signal.STOP if type(event).__name__ == "Stepped" and event.step == 3 else None

    keys = {"max_steps": 6, "plugins": ["stopper"]}
    outcome = run(config(**keys), stopper=Stopper())
    assert (outcome.reason, outcome.step, outcome.checkpoint.step) == ("stopped", 3, 3)
    outcome = run(config(resume="auto", **keys), stopper=Stopper())
    assert (outcome.reason, outcome.step) == ("finished", 6)
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adamw": {"learning_rate": 1.0}}, "adamw.learning_rate was 0.0002, is now 1.0"),
        ({"max_grad_norm": 7.0}, "trainer.max_grad_norm was 1.0, is now 7.0"),
        ({"seed": 5}, "seed was 0, is now 5"),
        ({"plugins": ["neftune"]}, "the plugin neftune was not active, is now"),
    ],
)
def test_a_run_goes_on_with_the_settings_it_began_with(config: Any, change: Any, message: str) -> None:
    run(config(max_steps=2))
    with pytest.raises(ConfigError, match=message):
        run(config(**{"max_steps": 4, "resume": "auto", **change}))


def test_what_only_watches_and_how_a_step_is_split_may_change(config: Any, tmp_path: Path) -> None:
    class Watch:
        @hookimpl
        def on_event(self, event: Any) -> None:
            """Nothing."""

    flat = {"schedule": "constant"}
    run(config(max_steps=2, micro_batch=4, adamw=flat))
    run(
        config(max_steps=4, micro_batch=2, accumulation=2, log_every=2, plugins=["w"], adamw=flat, resume="auto"),
        w=Watch(),
    )
    assert checkpoint(tmp_path / "run", 4).is_dir()


def test_a_failure_after_a_checkpoint_says_how_to_go_on(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing:
        at = 1

        @hookimpl
        def on_event(self, event: Any) -> None:
            if type(event).__name__ == "Stepped" and event.step == self.at:
                raise RunError("it broke", "A test breaks it.", "Nothing.")

    failing, keys = Failing(), {"max_steps": 6, "save_every": 2, "plugins": ["failing"]}
    with pytest.raises(RunError, match="it broke"):
        run(config(**keys), failing=failing)
    assert "resume=auto" not in caplog.text
    for failing.at, complete in ((5, 4), (5, 4), (6, 4)):
        caplog.clear()
        with pytest.raises(RunError, match="it broke"):
            run(config(resume="auto", **keys), failing=failing)
        assert f"checkpoint of step {complete} is complete ({checkpoint(tmp_path / 'run', complete)})" in caplog.text
        assert "resume=auto" in caplog.text
    failing.at = 0
    assert run(config(resume="auto", **keys), failing=failing).step == 6
