"""Tiny models on disk, and runs that adapt them on a quantized base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model, Processor
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

PLUGINS = ["hf", "bnb", "lora"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the tiny model, with a tokenizer."""
    tiny_model().module.save_pretrained(tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0, "word": 1}, unk_token="word")), eos_token="<end>"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def load(base: Path, tmp_path: Path) -> Callable[..., tuple[Context, Model]]:
    """Loads the quantized base: `load(kind="int8")`; `adapt=True` adds an adapter, `meta=True` reads nothing."""

    def run(
        name: Path = base,
        plugins: list[str] = PLUGINS,
        adapt: bool = False,
        meta: bool = False,
        device: str = "cpu",
        model: dict[str, Any] | None = None,
        **bnb: Any,
    ) -> tuple[Context, Model]:
        sections = {"bnb": bnb, "lora": {"r": 4, "init": "gaussian"}}
        config = {"model": {"name": str(name), **(model or {})}, "plugins": plugins, "output": str(tmp_path / "run")}
        ctx = compose({**config, **{key: value for key, value in sections.items() if key in plugins}})
        ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, device=torch.device(device))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
        ctx.processor = Processor(tokenizer=tokenizer, pad_id=0, fingerprint="")
        made = ctx.call(hooks.load_model, ctx, model_request(ctx, meta=meta))
        return ctx, ctx.call(hooks.apply_adapters, ctx, made) if adapt else made

    return run
