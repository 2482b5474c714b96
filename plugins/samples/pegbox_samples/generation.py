"""Answering prompts with the model as it is, without leaving a trace in the run.

The module's modes and the global random generators are put back, and sampling has randomness of its own, so a run is
the same with and without samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Module

    from pegbox_samples.config import SamplesConfig
    from pegbox_samples.prompts import Prompt


def write_samples(ctx: Context, config: SamplesConfig, model: Model, step: int, prompts: Sequence[Prompt]) -> None:
    """Write `samples/step-<step>.jsonl` into the run's folder, one object for each prompt; print them if asked to."""
    tokenizer = ctx.processor.tokenizer
    rows = []
    with _undisturbed(model.module, ctx.rng("samples", step).seed):
        for prompt in prompts:
            answer = generate(config, model.module, prompt.ids, ctx.processor.pad_id)
            rows.append(
                {
                    "step": step,
                    "source": prompt.source,
                    "prompt": tokenizer.decode(list(prompt.ids)),
                    "completion": tokenizer.decode(answer),
                    "tokens": len(answer),
                    "reference": tokenizer.decode(list(prompt.reference)) if prompt.reference else None,
                }
            )
    path = ctx.folder / "samples" / f"step-{step:08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for row in rows if config.show else ():
        print(f"step {step}  {row['source']}\n  {row['prompt']!r}\n  -> {row['completion']!r}", flush=True)


def generate(config: SamplesConfig, module: Any, prompt: Sequence[int], pad_id: int) -> list[int]:
    """The tokens that the module answers one prompt with."""
    ids_1T = torch.tensor([list(prompt)], device=next(module.parameters()).device)
    sampling = {"temperature": config.temperature, "top_p": config.top_p} if config.temperature else {}
    output = module.generate(
        input_ids=ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=config.max_new_tokens,
        do_sample=bool(config.temperature),
        pad_token_id=pad_id,
        use_cache=True,
        **sampling,
    )
    return [int(token) for token in output[0, ids_1T.shape[1] :]]


@contextmanager
def _undisturbed(module: Module, seed: int) -> Iterator[None]:
    """In evaluation mode, without gradients, with a seed; afterwards everything is as it was."""
    trained = [part for part in module.modules() if part.training]
    device = next(module.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        module.eval()
        try:
            yield
        finally:
            for part in trained:
                part.training = True
