"""Each tracker is given the run's config, plan and figures; read back with the tracker's own reader."""

from __future__ import annotations

import importlib.util
import json
import logging
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError
from pegbox.events import Evaluated, Logged, RunEnded, RunFailed, RunStarted
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.types import Outcome
from pegbox_trackers import libraries
from pegbox_trackers.tracking import named, plain

TINY = str(Path(__file__).with_name("tiny_run.py"))


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


def context(folder: Path, rank: int = 0, resume: str | None = None, **trackers: Any) -> Any:
    config = {"model": {"name": "m"}, "plugins": ["trackers"], "output": str(folder), "trackers": trackers}
    ctx = compose({**config, "resume": resume, "seed": 7})
    ctx.runtime = SimpleNamespace(rank=rank, local_rank=rank, world_size=2)
    return ctx


def follow(ctx: Any, first: int = 0, last: int = 3, end: Any = None) -> None:
    """What the loop tells: steps first + 1 to last, one evaluation, the end."""
    ctx.notify(RunStarted(job=None, step=first))  # type: ignore[arg-type]
    for step in range(first + 1, last + 1):
        ctx.notify(Logged(step=step, metrics={"loss": 1 / step, "learning_rate": 1e-4}))
    ctx.notify(Evaluated(step=last, model=None, metrics={"eval_loss": 0.5}))  # type: ignore[arg-type]
    outcome = Outcome(reason="finished", step=last)
    ctx.notify(end or RunEnded(outcome=outcome, folder=ctx.folder))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


@needs("tensorboard")
def test_a_whole_run_is_in_tensorboard(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "adamw", "trainer", "trackers"],
        "output": str(tmp_path / "run"),
        "trainer": {"max_steps": 3, "micro_batch": 2, "log_every": 1, "progress": "none", "device": "cpu"},
        "trackers": {"tensorboard": {}},
    }
    execute(compose(config))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    found = scalars(tmp_path / "run" / "tensorboard")
    for key in ("loss", "grad_norm", "learning_rate"):
        assert found[f"train/{key}"] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in train]
    assert len(found["eval/loss"]) == 1


@needs("tensorboard")
def test_tensorboard_holds_config_and_plan(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    follow(context(tmp_path / "run", tensorboard={"folder": "events"}))
    found: dict[str, Any] = {}
    for folder in (path.parent for path in (tmp_path / "run" / "events").rglob("events*")):
        read = EventAccumulator(str(folder))
        read.Reload()
        start = read.summary_metadata.get("_hparams_/session_start_info")
        if start is not None:
            data = plugin_data_pb2.HParamsPluginData.FromString(start.plugin_data.content)
            found = dict(data.session_start_info.hparams.items())
    assert found["seed"].number_value == 7
    assert found["model.name"].string_value == "m"
    assert "trackers" in found["plan.plugins"].string_value
    assert found["plan.digest"].string_value


@needs("tensorboard")
def test_a_resumed_run_goes_on_in_tensorboard_where_its_checkpoint_was(tmp_path: Path) -> None:
    follow(context(tmp_path / "run", tensorboard={}), last=5)
    follow(context(tmp_path / "run", resume="auto", tensorboard={}), first=3, last=6)
    steps = [step for step, _ in scalars(tmp_path / "run" / "tensorboard")["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]


@needs("tensorboard")
def test_only_rank_0_tracks(tmp_path: Path) -> None:
    follow(context(tmp_path / "run", rank=1, tensorboard={}))
    assert not (tmp_path / "run").exists()


@needs("wandb")
def test_wandb_keeps_figures_and_config_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"project": "p", "mode": "offline", "tags": ["a"]}
    follow(context(tmp_path / "run", wandb=options))
    (file,) = (tmp_path / "run").rglob("run-*.wandb")
    history, config = offline_run(file)
    assert [row["train/loss"] for row in history if "train/loss" in row] == [1, 1 / 2, pytest.approx(1 / 3)]
    assert [row["eval/loss"] for row in history if "eval/loss" in row] == [0.5]
    assert config["seed"] == 7
    assert config["plan.plugins"].startswith("trackers")
    before = json.loads((tmp_path / "run" / "trackers.json").read_text())
    follow(context(tmp_path / "run", resume="auto", wandb=options), first=3, last=5)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == before
    assert all(before["wandb"] in path.name for path in (tmp_path / "run").rglob("run-*.wandb"))


def offline_run(file: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from wandb.proto import wandb_internal_pb2

    history, config, kinds = [], {}, set()
    deadline = time.monotonic() + 20
    while "exit" not in kinds and time.monotonic() < deadline:  # a process of its own writes the file
        time.sleep(0.05)
        records = [wandb_internal_pb2.Record.FromString(data) for data in logged_records(file.read_bytes())]
        kinds = {record.WhichOneof("record_type") for record in records}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        for part in (record.config, record.run.config):
            config.update({i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in part.update})
    return history, config


def logged_records(content: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: blocks of 32 KiB; each piece has a checksum, a length and a kind."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield whole
            whole = b""


@needs("mlflow")
def test_mlflow_keeps_figures_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "store").as_uri()
    options = {"experiment": "e", "tracking_uri": store, "tags": {"team": "x"}}
    follow(context(tmp_path / "run", mlflow=options))
    follow(context(tmp_path / "run", resume="auto", mlflow=options), first=3, last=5)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(step, 1 / step) for step in range(1, 6)]
    assert run.data.params["seed"] == "7"
    assert run.data.tags["team"] == "x"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    follow(context(tmp_path / "other", mlflow=options), end=RunFailed(error=ValueError("x")))
    failed = client.search_runs(run.info.experiment_id, "attributes.run_name = 'other'")
    assert [one.info.status for one in failed] == ["FAILED"]


OFFLINE = {"swanlab": {"mode": "offline"}, "comet": {"online": False}, "trackio": {}}


@pytest.mark.parametrize("name", OFFLINE)
def test_other_trackers_take_a_run_and_go_on_with_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip(libraries.LIBRARIES[name].module)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    follow(context(tmp_path / "run", **{name: OFFLINE[name]}))
    before = json.loads((tmp_path / "run" / "trackers.json").read_text())
    assert list(before) == [name]
    follow(context(tmp_path / "run", resume="auto", **{name: OFFLINE[name]}), first=3, last=5)
    assert json.loads((tmp_path / "run" / "trackers.json").read_text()) == before
    assert "best effort" not in caplog.text


def test_a_missing_library_is_an_error_before_the_run_with_the_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        libraries.importlib.util, "find_spec", lambda name, *a: None if name == "comet_ml" else found(name, *a)
    )
    config = {"model": {"name": "tiny"}, "plugins": [TINY, "sft", "adamw", "trainer", "trackers"]}
    config |= {"output": str(tmp_path / "run"), "trackers": {"comet": {}}}
    with pytest.raises(ConfigError, match="comet_ml") as raised:
        execute(compose(config))
    assert "pip install 'pegbox-trackers[comet]'" in raised.value.next
    assert not (tmp_path / "run").exists()


@needs("tensorboard")
def test_a_tracker_that_fails_stops_neither_the_run_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(libraries.LIBRARIES, "trackio", libraries.Library("os", broken, str))
    with caplog.at_level(logging.WARNING, logger="pegbox"):
        follow(context(tmp_path / "run", tensorboard={}, trackio={}))
    assert "no network" in caplog.text
    assert len(scalars(tmp_path / "run" / "tensorboard")["train/loss"]) == 3


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({}, "no tracker is chosen"),
        ({"wandb": {"mode": "sometimes"}}, "mode"),
        ({"wandbb": {}}, "Did you mean 'wandb'"),
        ({"wandb": {"projet": "x"}}, "Did you mean 'project'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section: dict, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose({"model": {"name": "m"}, "plugins": ["trackers"], "trackers": section})
    assert says in str(raised.value)


def test_every_tracker_has_a_library() -> None:
    from pegbox_trackers.config import TrackersConfig

    assert set(TrackersConfig.model_fields) == set(libraries.LIBRARIES)


def test_figures_are_named_after_their_split() -> None:
    assert named("eval", {"eval_loss": 1.0, "eval_entropy": 2.0}) == {"eval/loss": 1.0, "eval/entropy": 2.0}
    assert (plain(None), plain([1]), plain(True)) == ("null", "[1]", True)
