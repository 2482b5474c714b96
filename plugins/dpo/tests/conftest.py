"""A tiny model on disk with a tokenizer of words, and helpers beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pegbox.testing.tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with clear preferences, whose tokens are the words t0, t1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dpo") / "base"
    tiny_model(initializer_range=0.2).module.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t258", pad_token="t256").save_pretrained(folder)
    return folder
