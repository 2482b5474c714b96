"""Rows of reasoning-gym reach the data plugin as those of any other source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pegbox import hooks
from pegbox.plan import compose
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def test_the_data_plugin_reads_the_source(tmp_path: Path) -> None:
    from pegbox.types import Processor

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "+": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    entry: dict[str, Any] = {
        "source": "reasoning-gym",
        "source_options": {"task": "chain_sum", "rows": 6, "seed": 4},
        "format": "completion",
        "fields": {"completion": "answer"},
        "options": {"chat_template": False},
    }
    config = {
        "model": {"name": "x"},
        "plugins": ["data", "reward-functions"],
        "data": {"train": [entry], "columns": ["answer", "entry"], "cache": "off", "workers": 1},
        "reward-functions": {"functions": ["reasoning-gym"]},
        "output": str(tmp_path / "run"),
    }
    ctx = compose(config)
    with ctx.exit:
        processor = Processor(tokenizer=tokenizer, pad_id=1, fingerprint="words")
        rows: Any = ctx.call(hooks.build_dataset, ctx, processor, "train")
        assert len(rows) == 6
        assert set(rows[0].columns) == {"answer", "entry"}
