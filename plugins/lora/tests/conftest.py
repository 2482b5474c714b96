"""A tiny model on disk with a tokenizer, and a run that adapts it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model, Processor
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the tiny model."""
    tiny_model().module.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapt(tmp_path: Path) -> Callable[..., tuple[Context, Model]]:
    """Applies the adapter: `adapt(model, r=4)`; every adapter parameter is then moved off its beginning."""

    def run(model: Model, moved: bool = True, **settings: Any) -> tuple[Context, Model]:
        ctx = compose({"model": {"name": str(model.base)}, "plugins": ["lora"], "lora": settings})
        ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word")), eos_token="<end>"
        )
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        ctx.processor = Processor(tokenizer=tokenizer, pad_id=0, fingerprint="")
        adapted = ctx.call(hooks.apply_adapters, ctx, model)
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in adapted.module.parameters() if moved else ():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype))
        return ctx, adapted

    return run
