"""What a newcomer does on the first day, by the command line: train, resume, generate, merge, report, open elsewhere.

Every command is a process of its own, and on stderr only plugins that the config lists speak: what is merely installed
stays silent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
OWN = ("data: ", "packing: ", "2 of 2 rows")
ROLES = {"user": "human", "assistant": "gpt"}


def pegbox(*words: str | Path, code: int = 0) -> str:
    command = [sys.executable, "-m", "pegbox", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    if code == 0:
        strange = [line for line in done.stderr.splitlines() if not line.startswith(OWN)]
        assert not strange, done.stderr
        return done.stdout
    return done.stderr


def write(base: Path, rows: Path, folder: Path) -> Path:
    """A ShareGPT file beside a config that trains on it."""
    messages = [json.loads(line)["messages"] for line in rows.read_text(encoding="utf-8").splitlines()]
    turns = [[{"from": ROLES[turn["role"]], "value": turn["content"]} for turn in turns] for turns in messages]
    lines = "".join(json.dumps({"conversations": turn}) + "\n" for turn in turns)
    (folder / "sharegpt.jsonl").write_text(lines, encoding="utf-8")
    entry = {
        "path": "sharegpt.jsonl",
        "fields": {"messages": "conversations", "role": "from", "content": "value"},
        "options": {"roles": {theirs: ours for ours, theirs in ROLES.items()}},
    }
    config = {
        "model": {"name": str(base)},
        "plugins": ["hf", "templates", "data", "packing", "lora", "sft", "adamw", "trainer"],
        "hf": {"chat_template": "chatml"},
        "data": {"train": [entry], "eval_rows": 4},
        "packing": {"length": 128},
        "lora": {"r": 4},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 4, "micro_batch": 2, "log_every": 1, "eval_every": 2, "save_every": 2},
        "output": str(folder / "run"),
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "train.yaml"


def test_from_a_sharegpt_file_to_a_merged_model(base: Path, rows: Path, tmp_path: Path) -> None:
    config, run = write(base, rows, tmp_path), tmp_path / "run"
    assert "step 4/4" in pegbox("run", config)
    assert "already holds a run" in pegbox("run", config, code=2)
    assert "step 6/6" in pegbox("run", config, "resume=auto", "trainer.max_steps=6")

    pegbox("generate", run, prompts(tmp_path), tmp_path / "answers.jsonl", "--max-tokens", "3")
    assert len((tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert pegbox("chat", run, "--message", "list files", "--max-tokens", "3", "--temperature", "0")
    assert "same likeliest token at 100.0%" in pegbox("merge", run)
    pegbox("report", run)
    assert "<html" in (run / "report.html").read_text(encoding="utf-8")

    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(run)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "list files"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**ids).logits, adapted(**ids).logits, rtol=1e-4, atol=1e-4)


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "list files"}\n{"prompt": "show lines"}\n', encoding="utf-8")
    return path
