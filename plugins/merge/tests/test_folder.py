"""What is written, when, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pegbox.errors import RunError, UserError
from pegbox_merge import merging
from pegbox_merge.merging import MergeRequest, write_merged
from pegbox_merge.runs import open_run
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

QV = ["q_proj", "v_proj"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("wide", {"target_modules": "all-linear"}),
        pytest.param(
            "wide-moe",
            {"target_modules": QV, "target_parameters": ["mlp.experts.gate_up_proj"]},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_memory_stays_under_twice_the_largest_shard(
    kind: str, settings: dict, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    warm_up = adapter_on(bases("llama"), target_modules=QV).rename(tmp_path / "warm-up")
    base = bases(kind, torch.bfloat16, "40MB")
    run = adapter_on(base, **settings)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    assert total > 2.5 * largest
    script = str(Path(__file__).with_name("peak_of_merge.py"))
    # Freed tensors go back to the system at once; by default glibc does so for the sizes of real models only (32 MB).
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, str(warm_up), str(run), "40MB"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["shards"] > 2
    assert figures["grown"] <= 2 * largest, f"{figures['grown'] / largest:.2f} times the largest shard"


def test_the_folder_is_complete(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    GenerationConfig(eos_token_id=[0, 7]).save_pretrained(run)
    done = write_merged(open_run(run), MergeRequest(run / "merged"))
    names = {file.name for file in done.folder.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "merge.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert GenerationConfig.from_pretrained(done.folder).eos_token_id == [0, 7]
    assert AutoTokenizer.from_pretrained(done.folder).chat_template is not None
    record = json.loads((done.folder / "merge.json").read_text())
    assert (record["status"], record["onto"], record["changed"]) == ("unchecked", "the base's weights", 4)
    assert not list(run.glob(".*"))


def test_nothing_is_overwritten(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists"):
        write_merged(open_run(run), MergeRequest(tmp_path / "there"))
    assert not list((tmp_path / "there").iterdir())


def test_a_merge_that_fails_half_way_leaves_nothing(
    bases: Callable, adapter_on: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(merging, "copy_side_files", full_disk)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="no space"):
        write_merged(open_run(run), MergeRequest(tmp_path / "merged"))
    assert set(tmp_path.rglob("*")) == before


def test_a_fully_trained_run_has_nothing_to_merge(bases: Callable) -> None:
    with pytest.raises(UserError, match="nothing to merge"):
        open_run(bases("llama"))


def test_an_unfinished_run_is_told_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UserError, match="no adapter yet") as raised:
        open_run(tmp_path)
    assert "resume=auto" in raised.value.next


def test_a_base_that_moved_can_be_named(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(UserError, match="/gone/base is not there") as raised:
        open_run(run)
    assert "--base" in raised.value.next
    assert open_run(run, str(bases("llama"))).base == str(bases("llama"))


def test_an_adapter_of_another_base_is_refused(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    with pytest.raises(UserError, match="cannot be merged"):
        write_merged(open_run(run, str(bases("gpt2"))), MergeRequest(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "IA3"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(
    changes: dict, says: str, bases: Callable, adapter_on: Callable, tmp_path: Path
) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match=says):
        write_merged(open_run(run), MergeRequest(tmp_path / "merged"))


def test_a_size_that_is_none_is_refused(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV)
    with pytest.raises(UserError, match="--max-shard-size 'large'"):
        write_merged(open_run(run), MergeRequest(tmp_path / "merged", max_shard_size="large"))


def test_a_broken_adapter_is_refused(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama"), target_modules=QV, size=float("inf"))
    with pytest.raises(UserError, match="is not finite"):
        write_merged(open_run(run), MergeRequest(tmp_path / "merged"))


def test_the_command_merges_and_checks(bases: Callable, adapter_on: Callable, capsys: pytest.CaptureFixture) -> None:
    from pegbox_merge.command import merge

    run = adapter_on(bases("llama"), target_modules=QV)
    merge(run)
    said = capsys.readouterr().out
    assert "merged 4 of 21 tensors onto the base's weights" in said
    assert "checked on" in said
    assert json.loads((run / "merged" / "merge.json").read_text())["status"] == "checked"
    merge(run, output=run / "again", no_check=True)
    assert json.loads((run / "again" / "merge.json").read_text())["status"] == "unchecked"
    model = AutoModelForCausalLM.from_pretrained(run / "again")
    assert model.generation_config.eos_token_id == 0


def test_run_errors_end_with_code_1() -> None:
    assert RunError("x").exit_code == 1
