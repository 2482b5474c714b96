"""Whole runs: with the plugin a run has the losses it has without, padded and packed, and leaves a plain model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Examples
from pegbox.run import execute
from pegbox.testing.tiny import TinyExamples
from pegbox.types import Processor


class Texts:
    """Owns the rows of a run and a tokenizer that is only written at its end."""

    @hookimpl
    def load_processor(self) -> Processor:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word"))
        return Processor(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), pad_id=0, fingerprint="texts")

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        source = random.Random(0)
        lengths = [source.randint(3, 14) for _ in range(24)]
        texts = ["".join(chr(source.randint(33, 120)) for _ in range(length)) for length in lengths]
        return TinyExamples(texts) if split == "train" else None


def losses(folder: Path, out: Path, *plugins: str, **sections: Any) -> list[float]:
    config = {
        "model": {"name": str(folder)},
        "output": str(out),
        "plugins": ["texts", "hf", *plugins, "sft", "adamw", "trainer"],
        "use": {"load_processor": "texts"},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 4, "micro_batch": 2, "progress": "none", "device": "cpu", "save_every": None}
        | {"precision": "fp32", "log_every": 1},
        **sections,
    }
    execute(compose(config, instances={"texts": Texts()}))
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("rows", ["padded", "packed"])
def test_switching_the_plugin_off_leaves_the_losses_of_a_run_unchanged(rows: str, folder: Path, tmp_path: Path) -> None:
    packing: dict[str, Any] = {"packing": {"length": 32}} if rows == "packed" else {}
    plain = losses(folder, tmp_path / "plain", *packing, "activations", **packing)
    mine = losses(folder, tmp_path / "mine", *packing, "activations", "gpt-oss-attention", **packing)
    assert len(plain) == 4
    assert mine == pytest.approx(plain, abs=2e-5)
    written = (tmp_path / "mine" / "config.json").read_text(encoding="utf-8")
    assert "pegbox" not in written
