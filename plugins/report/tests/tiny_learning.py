"""Real runs of a random model of one token per byte: DPO on pairs, GRPO with a reward of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pegbox.plan import compose
from pegbox.run import execute

WORDS = (("hot", "cold.", "warm."), ("up", "down.", "high."), ("left", "right.", "wrong."), ("open", "shut.", "wide."))
REWARDS = """
def vowels(completions, **columns):
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
"""


def make_tiny(folder: Path) -> Path:
    """Save the model and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    letters = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), eos_token_id=0, pad_token_id=0, **shape))
    model.save_pretrained(folder)
    return folder


def run_dpo(folder: Path, steps: int = 6) -> Path:
    """Learn to prefer the first answer to the second; the run's folder."""
    rows = [{"prompt": f"The opposite of {word} is ", "chosen": yes, "rejected": no} for word, yes, no in WORDS]
    return _run(folder, "preference", rows, ["reference", "dpo"], steps, dpo={"beta": 0.1})


def run_grpo(folder: Path, steps: int = 6) -> Path:
    """Learn to write vowels; the run's folder."""
    rows = [{"prompt": f"The opposite of {word} is "} for word, *_ in WORDS]
    (folder / "tiny_reward.py").write_text(REWARDS)
    sections = {
        "grpo": {"samples": 4, "max_completion_length": 8},
        "reward-functions": {"functions": [f"{folder / 'tiny_reward.py'}:vowels"]},
        "rewards": {"vowels": 2.0},
    }
    return _run(folder, "prompts", rows, ["grpo", "rollout-hf", "reward-functions"], steps, **sections)


def _run(folder: Path, form: str, rows: list[dict[str, str]], plugins: list[str], steps: int, **sections: Any) -> Path:
    path = folder / f"{form}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {"max_steps": steps, "batch": 4, "log_every": 1, "save_every": None, "progress": "none", "device": "cpu"}
    config = {
        "model": {"name": str(make_tiny(folder / "tiny"))},
        "plugins": ["hf", "data", *plugins, "adamw", "trainer"],
        "output": str(folder / "run"),
        "data": {"train": [{"path": str(path), "format": form, "options": {"chat_template": False}}]},
        "adamw": {"learning_rate": 1e-2},
        "trainer": trainer,
        **sections,
    }
    execute(compose(config))
    return folder / "run"
