"""Whole runs with the trainer: the file they leave, on one process and two, uninterrupted and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pegbox.events import Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.testing import tiny_model
from pegbox.testing.tiny import collate
from safetensors.torch import load_file
from stand_in import TEXTS, Frozen, Plugin, Texts
from test_recording import plain_row_losses

pytest.importorskip("pegbox_trainer")

HERE = Path(__file__).parent


def run(folder: Path, stand_in: object, *, recording: bool = True, section: dict | None = None, **keys):
    trainer = {"epochs": 2, "micro_batch": 3, "progress": "none", "device": "cpu", "save_every": None, "log_every": 1}
    config = {
        "model": {"name": "tiny"},
        "plugins": ["plain", "trainer", *(["row-losses"] if recording else [])],
        "output": str(folder),
        "trainer": {**trainer, **keys.pop("trainer", {})},
        **({"row-losses": section} if section else {}),
        **keys,
    }
    ctx = compose(config, instances={"plain": stand_in})
    return ctx, execute(ctx)


def report(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "row_losses.jsonl").read_text().splitlines()]


def assert_plain(lines: list[dict]) -> None:
    """Every row with a trained token, highest loss first, with the loss that the frozen model gives it alone."""
    rows = Texts(TEXTS)
    expected = plain_row_losses(tiny_model(), [collate([rows[index]], (index,)) for index in range(len(rows))])
    assert 3 not in expected
    assert {line["row"] for line in lines} == set(expected)
    assert [line["loss"] for line in lines] == sorted((line["loss"] for line in lines), reverse=True)
    for line in lines:
        mean, tokens = expected[line["row"]]
        assert line["loss"] == pytest.approx(mean, rel=1e-4)
        assert line["last_loss"] == pytest.approx(mean, rel=1e-4)
        assert (line["tokens"], line["visits"]) == (tokens, 2)
        assert line["where"] == f"train.jsonl:{line['row'] + 1}"


def test_a_run_lists_the_loss_of_each_row_with_its_file_and_line(tmp_path: Path) -> None:
    run(tmp_path / "run", Frozen())
    assert_plain(report(tmp_path / "run"))


@pytest.mark.distributed
def test_two_processes_list_what_one_does(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(HERE / "two_processes.py"), str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_plain(report(tmp_path / "run"))


def test_training_is_the_same_to_the_bit_with_and_without_it(tmp_path: Path) -> None:
    plain, recorded = (run(tmp_path / str(flag), Plugin(), recording=flag)[1] for flag in (False, True))
    weights = [load_file(outcome.checkpoint.path / "model.safetensors") for outcome in (plain, recorded)]
    assert plain.metrics["loss"] == recorded.metrics["loss"]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_resumed_run_lists_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    settings = {"trainer": {"save_every": 2, "keep": None, "epochs": 3}}
    run(tmp_path / "run", Plugin(), **settings)
    whole = report(tmp_path / "run")
    assert {line["visits"] for line in whole} == {3}
    (tmp_path / "run" / "row_losses.jsonl").unlink()
    run(tmp_path / "run", Plugin(), resume="step-00000004", **settings)
    assert report(tmp_path / "run") == whole


def test_a_run_that_fails_has_the_list_of_its_last_checkpoint(tmp_path: Path) -> None:
    class Fails(Plugin):
        @hookimpl
        def on_event(self, event):
            if isinstance(event, Stepped) and event.step == 5:
                raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        run(tmp_path / "run", Fails(), trainer={"save_every": 3})
    assert {line["visits"] for line in report(tmp_path / "run")} == {1}


def test_the_section_chooses_what_is_listed(tmp_path: Path) -> None:
    run(tmp_path / "run", Frozen(), section={"keep": 2, "min_tokens": 9})
    lines = report(tmp_path / "run")
    assert len(lines) == 2
    assert all(line["tokens"] >= 9 for line in lines)
