"""Fixed probes: token sequences whose log-probabilities server and trainer must agree on.

Half of them are sentences, half are drawn from the run's seed over the whole vocabulary, its last token included, so
that a server with another vocabulary refuses them, and one with other weights gives other numbers. The numbers of two
correct programs differ by rounding alone; `tolerance` is the mean difference over all probe tokens that is still taken
for that.
For SmolLM2-135M in bfloat16 against float32, transformers alone differs by 0.05 nats on sentences and by 0.10 on drawn
tokens, whose log-probabilities are -15.6 in the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from pegbox.rows import Batch

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model

Probes = tuple[tuple[int, ...], ...]
LENGTH = 16
DRAWN = 2
SENTENCES = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is Madrid.",
    "Question: what is 17 + 25? Answer: 17 + 25 = 42. Question: what is 9 * 8? Answer: 72.",
)
EXACT, HALF = 1e-3, 0.2
"""Allowed mean difference, in nats: both in float32; one of them in half precision."""


def draw(ctx: Context, model: Model) -> Probes:
    """The probes of this run: a row of LENGTH token ids for each sentence, and DRAWN more; short ones are filled up."""
    tokenizer = ctx.processor.tokenizer
    special = set(tokenizer.all_special_ids)
    # Some tokenizers know more tokens than their model.
    embeddings = getattr(model.module, "get_input_embeddings", lambda: None)()
    known = len(tokenizer) if embeddings is None else min(len(tokenizer), embeddings.weight.shape[0])
    last = max(token for token in range(known) if token not in special)
    source = ctx.rng("rollout-vllm/probes").python()
    rows = [[int(token) for token in tokenizer.encode(text, add_special_tokens=False)] for text in SENTENCES]
    rows += [[last] for _ in range(DRAWN)]
    for row in rows:
        while len(row) < LENGTH:
            token = source.randrange(last + 1)
            if token not in special:
                row.append(token)
    return tuple(tuple(row[:LENGTH]) for row in rows)


def trainer_logps(ctx: Context, model: Model, probes: Probes) -> list[float]:
    """Log-probability of each probe token after the first, by the trainer's own forward; every rank computes it."""
    assert model.forward is not None, "the model was placed"
    ids_BT = torch.tensor(probes)
    targets_BT = torch.full_like(ids_BT, -100)
    targets_BT[:, :-1] = ids_BT[:, 1:]
    trained_N = (targets_BT.flatten() != -100).nonzero()[:, 0]
    batch = Batch(
        input_ids_BT=ids_BT,
        targets_BT=targets_BT,
        trained_N=trained_N,
        attention_mask_BT=torch.ones_like(ids_BT),
        document_N=trained_N // ids_BT.shape[1],
        last_D=(torch.arange(len(probes)) + 1) * ids_BT.shape[1] - 1,
        rows=tuple(range(len(probes))),
    )
    training = [module for module in model.module.modules() if module.training]
    model.module.eval()
    try:
        with torch.no_grad():
            logps_N = model.forward(batch.to(ctx.runtime.device), frozenset({"logps"})).logps_N
    finally:
        for module in training:
            module.training = True
    assert logps_N is not None, "log-probabilities were asked for"
    return [float(value) for value in logps_N.float().cpu()]


def difference(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean absolute difference, in nats."""
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def tolerance(ctx: Context, told: float | None, dtype: str) -> float:
    """The difference that is still rounding: what the config says, else by the arithmetic of both sides."""
    if told is not None:
        return told
    server_exact = dtype == "float32" or (dtype == "auto" and ctx.runtime.precision == "fp32")
    return EXACT if server_exact and ctx.runtime.precision == "fp32" else HALF
