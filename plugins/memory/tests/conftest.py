"""Configs of small models in a folder, and runs of them whose memory is counted while they train."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
MEDIUM = {**SMALL, "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
SHAPES: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "medium": MEDIUM,
    "tied": {**SMALL, "tie_word_embeddings": True},
    "mixture": {
        **SMALL,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 16,
    },
    "gpt-oss": {
        **SMALL,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`model_folder("small")`: a random model, saved."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            made[name] = tmp_path_factory.mktemp("models") / name
            config = transformers.AutoConfig.for_model(**SHAPES[name])
            transformers.AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture
def config_of(tmp_path: Path, model_folder: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    """`config_of("lora", model="small", lora={"r": 4}, trainer={...})`: a config that trains on the CPU."""

    def make(*plugins: str, model: str = "small", **sections: Any) -> dict[str, Any]:
        trainer = {"device": "cpu", "micro_batch": 2, "max_steps": 3, "save_every": None, "progress": "none"}
        merged = {**sections, "trainer": {**trainer, **sections.get("trainer", {})}}
        return {
            "model": {"name": str(model_folder(model))},
            "plugins": ["hf", *plugins, "sft", "adamw", "trainer"],
            "output": str(tmp_path / "run"),
            **merged,
        }

    return make
