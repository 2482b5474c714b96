"""The rows that ship with the quickstart are what prepare.py makes, and fit what the quickstart promises."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

HERE = Path(__file__).parent.parent


def rows(name: str) -> list[dict[str, list[dict[str, str]]]]:
    return [json.loads(line) for line in (HERE / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_row_is_one_request_and_one_command(split):
    for row in rows(split):
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in row["messages"])


def test_no_held_out_request_is_trained_or_asked():
    trained = {row["messages"][0]["content"] for row in rows("train")}
    held_out = {row["messages"][0]["content"] for row in rows("eval")}
    prompts = {prompt.lower() for prompt in json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))}
    assert len(held_out) == len(rows("eval"))
    assert not trained & held_out
    assert not {request.lower() for request in trained | held_out} & prompts


def test_no_command_removes_files_or_ends_processes():
    destroys = re.compile(r"\brm\b|\brmdir\b|-delete\b|\bkill\b|\bshred\b")
    assert not [
        row for split in ("train", "eval") for row in rows(split) if destroys.search(row["messages"][1]["content"])
    ]


def test_data_md_says_how_many_rows_there_are_and_quotes_the_licence():
    text = (HERE / "DATA.md").read_text(encoding="utf-8")
    assert f"{len(rows('train'))} in `data/train.jsonl`, {len(rows('eval'))} in `data/eval.jsonl`" in text
    assert "Permission is hereby granted, free of charge" in text
    assert load("prepare").PACKAGE.replace("==", "` ") in text


def test_prepare_joins_spaces_splits_by_request_and_drops_what_destroys(tmp_path):
    prepare = load("prepare")
    requests = [
        {"query": f"list   folder {i}", "gold": f"ls {i} ", "gold2": f"ls {i}" if i % 2 else f"ls -l {i}"}
        for i in range(40)
    ]
    requests.append({"query": "clean up", "gold": "find . -empty", "gold2": "find . -empty -delete"})
    wheel = tmp_path / "icalfa-0.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("icalfa/assets/datasets/nl2bash_fs_1.json", json.dumps(requests))
        archive.writestr("icalfa/assets/other.json", "[]")
    lines = prepare.build(wheel)
    asked = {split: [json.loads(line)["messages"][0]["content"] for line in lines[split]] for split in lines}
    assert set(asked["train"]) | set(asked["eval"]) == {f"list folder {i}" for i in range(40)}
    assert not set(asked["train"]) & set(asked["eval"])
    assert len(asked["eval"]) == len(set(asked["eval"])) > 0
    assert all(
        asked["train"].count(request) == (1 if int(request.split()[-1]) % 2 else 2) for request in asked["train"]
    )
    assert prepare.build(wheel) == lines


def test_the_config_names_files_that_exist_and_no_run_can_be_overwritten(tmp_path):
    config = yaml.safe_load((HERE / "config.yaml").read_text(encoding="utf-8"))
    for split in ("train", "eval"):
        assert all((HERE / entry["path"]).is_file() for entry in config["data"][split])
    quickstart = load("quickstart")
    output = tmp_path / "quickstart"
    for name in ("quickstart", "quickstart-2", "quickstart-3"):
        assert quickstart.free(output) == tmp_path / name
        (tmp_path / name).mkdir()
