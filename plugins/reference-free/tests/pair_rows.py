"""Random preferences: as examples, as batches that are padded or packed, and a run on them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Batch, Example, Examples
from pegbox.run import execute
from pegbox.testing.tiny import PAD, collate, tiny_model
from pegbox.types import ExportRequest, Item, Loss, Model, Processor
from pegbox_reference_free.config import CpoConfig, OrpoConfig, SimpoConfig
from pegbox_reference_free.contrast import cpo_loss, simpo_loss
from pegbox_reference_free.odds import OrpoLoss


def loss_of(plugin: str, section: Mapping[str, Any] | None = None) -> Loss:
    """The loss that a plugin builds from its section."""
    config = section or {}
    if plugin == "orpo":
        return OrpoLoss(OrpoConfig(**config))
    return cpo_loss(CpoConfig(**config)) if plugin == "cpo" else simpo_loss(SimpoConfig(**config))


class Pair(NamedTuple):
    """A preference, as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def random_pairs(count: int, seed: int = 0, prompt: int | None = None) -> list[Pair]:
    """Pairs whose answers have 1 to 9 tokens, and prompts as many as said, or 1 to 6."""
    source = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [source.randrange(256) for _ in range(length)]

    lengths = [(prompt or source.randint(1, 6), source.randint(1, 9), source.randint(1, 9)) for _ in range(count)]
    return [Pair(tokens(a), tokens(b), tokens(c)) for a, b, c in lengths]


def example_of(pair: Pair) -> Example:
    """One row of two documents."""
    chosen, rejected = pair.prompt + pair.chosen, pair.prompt + pair.rejected
    untrained = [UNTRAINED] * len(pair.prompt)
    return Example(
        input_ids=chosen + rejected,
        labels=untrained + pair.chosen + untrained + pair.rejected,
        documents=(len(chosen), len(rejected)),
        signs=(1, -1),
    )


def padded(pairs: Sequence[Pair], signs: tuple[int, ...] | None = (1, -1)) -> Batch:
    """Each answer is a line."""
    documents = []
    for pair in pairs:
        for answer, sign in zip((pair.chosen, pair.rejected), signs or (0, 0), strict=True):
            labels = [UNTRAINED] * len(pair.prompt) + answer
            documents.append(Example(input_ids=pair.prompt + answer, labels=labels, signs=(sign,) if signs else ()))
    return collate(documents, tuple(range(len(pairs))))


def packed(pairs: Sequence[Pair]) -> Batch:
    """All answers on one line."""
    ids, targets, positions, documents, last, borders = [], [], [], [], [], [0]
    for example in map(example_of, pairs):
        start = 0
        for length in example.documents:
            part = slice(start, start + length)
            ids += example.input_ids[part]
            targets += [*example.labels[part][1:], UNTRAINED]
            positions += range(length)
            documents += [len(last)] * length
            last.append(len(ids) - 1)
            borders.append(len(ids))
            start += length
    targets_BT = torch.tensor([targets])
    trained_N = (targets_BT[0] != UNTRAINED).nonzero()[:, 0]
    return Batch(
        input_ids_BT=torch.tensor([ids]),
        targets_BT=targets_BT,
        trained_N=trained_N,
        position_ids_BT=torch.tensor([positions]),
        cu_seqlens_S=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(positions) + 1,
        document_N=torch.tensor(documents)[trained_N],
        last_D=torch.tensor(last),
        sign_D=torch.tensor([1, -1] * len(pairs), dtype=torch.int8),
        rows=tuple(range(len(pairs))),
    )


def filler() -> Batch:
    """The micro-batch of a rank that has no rows."""
    ids_BT, none = torch.full((1, 2), PAD), torch.zeros(0, dtype=torch.int64)
    targets_BT = torch.full((1, 2), UNTRAINED)
    return Batch(input_ids_BT=ids_BT, targets_BT=targets_BT, trained_N=none, document_N=none, last_D=none)


def value_and_gradient(
    loss: Loss, step: Sequence[Batch], model: Model | None = None
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """The loss of a step, its terms and figures, and its gradient: totals over counts of the whole step."""
    model = model or tiny_model()
    model.module.zero_grad()
    counts: dict[str, float] = {}
    for batch in step:
        for name, count in loss.counts(batch).items():
            counts[name] = counts.get(name, 0.0) + count
    values, divisors = dict.fromkeys(counts, 0.0), dict(counts)
    whole = 0.0
    for batch in step:
        output = loss(batch, model.compute(model.module, batch, loss.needs))
        value = cast("torch.Tensor", sum(term.weight * term.total / counts[term.name] for term in output.terms))
        value.backward()
        whole += value.item()
        for term in output.terms:
            values[term.name] += term.total.item()
        for term in output.metrics:
            assert not term.total.requires_grad
            values[term.name] = values.get(term.name, 0.0) + term.total.item()
            divisors[term.name] = divisors.get(term.name, 0.0) + float(term.count)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.module.parameters()]
    return whole, {name: value / divisors[name] for name, value in values.items()}, gradient


def assert_same(left: tuple, right: tuple, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Value, figures that both have, and gradients are equal.

    A margin is as exact as the rewards it is the difference of; a gradient is compared by its norm, parameter by
    parameter: single entries are sums that may cancel.
    """
    torch.testing.assert_close(left[0], right[0], rtol=rtol, atol=atol)
    largest = max(abs(value) for name, value in right[1].items() if name.startswith("rewards/"))
    for name in left[1].keys() & right[1].keys():
        exact = max(atol, rtol * largest) if name == "rewards/margins" else atol
        torch.testing.assert_close(left[1][name], right[1][name], rtol=rtol, atol=exact, msg=name)
    for ours, theirs in zip(left[2], right[2], strict=True):
        assert (ours - theirs).norm() <= rtol * theirs.norm() + atol


class Rows:
    """Pairs as the rows of a split."""

    def __init__(self, pairs: Sequence[Pair], split: str) -> None:
        self.split, self.fingerprint, self.pairs = split, f"pairs-{len(pairs)}-{split}", pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        return example_of(self.pairs[index])

    def describe(self, index: int) -> str:
        return f"pair {index}"


class Tiny:
    """Owns what a run needs beyond the packages under test."""

    def __init__(self, rows: type[Rows] = Rows) -> None:
        self.rows, self.loaded = rows, False

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=cast("Any", None), pad_id=PAD, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples:
        return cast("Examples", self.rows(random_pairs(13 if split == "train" else 5, seed=len(split)), split))

    @hookimpl
    def load_model(self) -> Model:
        self.loaded = True
        return tiny_model()

    @hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        return request.folder


def run(
    folder: Path,
    plugins: Sequence[str],
    tiny: Tiny | None = None,
    sections: Mapping[str, Mapping[str, Any]] | None = None,
    **trainer: Any,
) -> Mapping[str, float]:
    """The figures of a run of three steps of all rows."""
    config = {
        "model": {"name": "tiny"},
        "output": str(folder),
        "plugins": ["tiny", *plugins, "adamw", "trainer"],
        "adamw": {"learning_rate": 1e-3},
        "trainer": {"epochs": 3.0, "batch": 16, "log_every": 3, "progress": "none", "device": "cpu", **trainer},
        **(sections or {}),
    }
    return execute(compose(config, instances={"tiny": tiny or Tiny()})).metrics
