"""The page holds what the run's folder holds, escaped, and nothing from outside."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from example_run import CONFIG, PROMPTS, metrics, write_run
from page_reader import NASTY, page_of
from pegbox.errors import UserError
from pegbox_report.command import report
from pegbox_report.page import embedded
from pegbox_report.run_files import read_run
from pegbox_report.series import page_data
from pegbox_report.units import number, seconds, size


def test_every_part_of_the_run_is_on_the_page(tmp_path: Path) -> None:
    read = page_of(write_run(tmp_path / "support-bot"))
    sections = [attributes.get("id") for tag, attributes in read.elements if tag == "section"]
    assert sections == ["health", "curves", "samples", "plan", "config", "origin", "checkpoints"]
    for key, value, origin in CONFIG:
        assert key in read.text
        assert json.dumps(value) in read.text
        assert origin in read.text
    for prompt, answers in PROMPTS.items():
        assert prompt in read.text
        assert all(text in read.text for _, text in answers)
    for shown in ("finished", "packing", "9f2b77c41a0de5f8", "12,834", "5.17.0", "step-00000400", "checked", "2.44 M"):
        assert shown in read.text, shown


def test_the_curves_hold_the_logged_figures(tmp_path: Path) -> None:
    data = json.loads(page_of(write_run(tmp_path / "run")).figures)
    titles = [chart["title"] for chart in data["charts"]]
    assert titles == ["Loss", "Gradient norm", "Learning rate", "Tokens per second", "Memory"]
    train, held_out = data["charts"][0]["series"]
    assert train["value"] == [row["loss"] for row in metrics() if row["kind"] == "train"]
    assert held_out["value"] == [row["eval_loss"] for row in metrics() if row["kind"] == "eval"]
    assert held_out["step"] == list(range(50, 401, 50))


def test_nothing_from_the_run_can_break_the_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [{"kind": "train", "step": 1, "loss": 1.0, NASTY: 2.0}])
    record = json.loads((folder / "run.json").read_text())
    record["plan"]["config"] += [{"key": NASTY, "value": NASTY, "from": NASTY}]
    record["plan"]["plugins"] += [{"name": NASTY, "from": NASTY}]
    record["plan"]["hooks"] += [{"hook": NASTY, "plugins": [NASTY], "wrappers": [NASTY], "reason": NASTY}]
    for key in ("processor", "digest"):
        record[key] = NASTY
    record["outcome"]["reason"] = NASTY
    record |= {"versions": {NASTY: NASTY}, "data": {NASTY: {"rows": 1, "fingerprint": NASTY}}, "command": [NASTY]}
    (folder / "run.json").write_text(json.dumps(record))
    row = {"step": NASTY, "prompt": NASTY, "completion": NASTY}
    (folder / "samples" / "x.jsonl").write_text(json.dumps({**row, "step": 5}) + "\n")
    (folder / "merged" / "merge.json").write_text(json.dumps({"status": NASTY, "dtype": NASTY}))
    read = page_of(folder)
    tags = [tag for tag, _ in read.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert read.text.count(NASTY) >= 15
    assert json.loads(read.figures)["charts"][1]["title"] == NASTY
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)


def test_embedded_json_ends_no_element() -> None:
    text = embedded({"a": NASTY + "\u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": NASTY + "\u2028"}


def test_the_page_asks_the_network_for_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    read = page_of(folder)
    assert not any({"src", "srcset", "action"} & set(attributes) for _, attributes in read.elements)
    links = [attributes["href"] for _, attributes in read.elements if "href" in attributes]
    assert all(str(link).startswith("#") for link in links)
    page = (folder / "report.html").read_text()
    assert set(re.findall(r"https?://[^\s\"')]+", page)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", page)


@pytest.mark.parametrize("rows", [[], [{"kind": "train", "step": 1, "loss": None, "grad_norm": None}]])
def test_a_run_that_just_began_or_was_killed_has_a_page(rows: list, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows, outcome=None, ended=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    for name in ("samples", "checkpoints", "merged"):
        (folder / name).rename(tmp_path / name)
    read = page_of(folder)
    assert "not finished" in read.text
    assert "samples" not in [attributes.get("id") for _, attributes in read.elements]


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        read_run(tmp_path / "none")


def test_a_page_can_be_written_elsewhere(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    report(folder, output=tmp_path / "pages" / "one.html")
    assert (tmp_path / "pages" / "one.html").read_text().startswith("<!doctype html>")
    assert not (folder / "report.html").exists()


def test_long_runs_are_thinned_and_keep_their_end() -> None:
    rows = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 10_001)]
    (chart,) = page_data(rows)["charts"]
    steps = chart["series"][0]["step"]
    assert len(steps) <= 3001
    assert (steps[0], steps[-1]) == (1, 10_000)


def test_prompts_that_are_messages_are_readable(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    row = {"step": 5, "prompt": messages, "completion": "Yes"}
    (folder / "samples" / "x.jsonl").write_text(json.dumps(row) + "\n")
    assert "system: Be brief.\nuser: Hi" in page_of(folder).text


def test_figures_are_written_as_people_read_them() -> None:
    assert [number(value) for value in (None, 0, 2e-5, 0.73123, 12, 18200.4, 2_440_000)] == [
        *("–", "0", "2.0e-05", "0.7312", "12", "18,200", "2.44 M"),
    ]
    assert [size(value) for value in (12, 3_400_000, 8 * 2**30)] == ["12 B", "3.2 MiB", "8.0 GiB"]
    assert [seconds(value) for value in (3.21, 456, 18720)] == ["3.2 s", "7 min 36 s", "5 h 12 min"]
