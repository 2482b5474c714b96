"""The page of a run that the trainer made: what it writes is what is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_report.command import report
from pegbox_report.run_files import read_run

torch = pytest.importorskip("torch")
TINY = str(Path(__file__).with_name("tiny_run.py"))


def test_a_run_of_the_trainer_has_a_page_with_all_its_figures(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "adamw", "trainer"],
        "output": str(tmp_path / "run"),
        "trainer": {"max_steps": 4, "micro_batch": 2, "log_every": 1, "progress": "none", "device": "cpu"},
    }
    execute(compose(config))
    run = read_run(tmp_path / "run")
    assert run.status == "finished"
    assert [row["step"] for row in run.metrics if row["kind"] == "train"] == [1, 2, 3, 4]
    assert [one.name for one in run.checkpoints] == ["step-00000004"]
    report(tmp_path / "run", output=None)
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Loss", "Gradient norm", "Learning rate", "Tokens per second"):
        assert f'"title":"{title}"' in page
    for key in ("trainer.max_steps", run.record["digest"], run.record["data"]["train"]["fingerprint"]):
        assert json.dumps(key)[1:-1] in page
