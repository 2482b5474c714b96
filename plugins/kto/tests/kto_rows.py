"""Random answers that are wanted or not: as examples, batches, sources of a real trainer, and runs."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from pegbox import hooks
from pegbox.assembly import model_request, prepare_model
from pegbox.context import Context
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Batch, BatchSource, Example, Examples, Extra
from pegbox.run import execute
from pegbox.testing.tiny import PAD, collate, compute, tiny_model
from pegbox.types import ExportRequest, Item, Loss, Model, Processor

LOGPS = frozenset({"logps"})


class Answer(NamedTuple):
    """An answer to a prompt, as token ids."""

    prompt: list[int]
    ids: list[int]
    wanted: bool


def random_answers(count: int, seed: int = 0) -> list[Answer]:
    """The first is longer than any prompt of the others with any answer of them: so no mismatched one is cut."""
    source = random.Random(seed)

    def tokens(length: int) -> list[int]:
        return [source.randrange(256) for _ in range(length)]

    lengths = [(8, 10), *((source.randint(1, 6), source.randint(1, 9)) for _ in range(count - 1))]
    return [Answer(tokens(a), tokens(b), source.random() < 0.6) for a, b in lengths]


def example_of(answer: Answer) -> Example:
    """One row of one document."""
    return Example(
        input_ids=answer.prompt + answer.ids,
        labels=[UNTRAINED] * len(answer.prompt) + answer.ids,
        signs=(1 if answer.wanted else -1,),
    )


def pair_of(chosen: Answer, rejected: Answer) -> Example:
    """One row of two documents, a preference."""
    first, second = example_of(chosen), example_of(rejected)
    return Example(
        input_ids=[*first.input_ids, *second.input_ids],
        labels=[*first.labels, *second.labels],
        documents=(len(first.input_ids), len(second.input_ids)),
        signs=(1, -1),
    )


def with_extras(batch: Batch, kl: float = 0.3, answers: tuple[int, int] = (3, 2), seed: int = 0) -> Batch:
    """A batch as the plugins hand it out: a reference that is somewhere, a divergence, the answers of the step."""
    source = torch.Generator().manual_seed(seed)
    reference_N = -5 - torch.rand(batch.trained_tokens, generator=source)
    extra = {
        "reference_logps": Extra(value=reference_N, layout="trained"),
        "kto_kl": Extra(value=torch.tensor(kl), layout="global"),
        "kto_answers": Extra(value=torch.tensor(answers, dtype=torch.float32), layout="global"),
    }
    return replace(batch, extra=extra)


def padded(answers: Sequence[Answer]) -> Batch:
    """Each answer is a line."""
    return collate([example_of(answer) for answer in answers], tuple(range(len(answers))))


class Rows:
    """Examples as the rows of a split."""

    def __init__(self, rows: Sequence[Example], split: str = "train") -> None:
        self.split, self.fingerprint, self._rows = split, f"answers-{len(rows)}-{split}", rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        return f"answer {index}"


class Referenced:
    """A source whose batches carry the log-probabilities of a frozen model, those that it lays out too."""

    def __init__(self, source: Any, module: torch.nn.Module) -> None:
        self._source, self._module = source, module
        if hasattr(source, "take"):
            self.take = source.take

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        return map(self._beside, self._source)

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        return self._beside(self._source.lay_out(examples))

    def describe(self, batch: Batch) -> str:
        return self._source.describe(batch)

    def state_dict(self) -> dict[str, object]:
        return self._source.state_dict()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._source.load_state_dict(state_dict)

    def _beside(self, batches: Sequence[Batch]) -> list[Batch]:
        made = []
        for batch in batches:
            with torch.no_grad():
                logps_N = compute(self._module, batch, LOGPS).logps_N
            extra = Extra(value=cast("torch.Tensor", logps_N), layout="trained")
            made.append(replace(batch, extra={**batch.extra, "reference_logps": extra}))
        return made


class GivenReference:
    """Brings the reference's log-probabilities: those of another random model."""

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="extra", name="reference_logps", target="given")]

    @hookimpl(wrapper=True)
    def build_batches(self) -> Generator[None, BatchSource, BatchSource]:
        source = yield
        return cast("BatchSource", Referenced(source, tiny_model(seed=1).module))


class Tiny:
    """Owns what a run needs beyond the packages under test."""

    def __init__(self, train: Sequence[Example], held_out: Sequence[Example] = (), **changes: Any) -> None:
        self.splits, self.changes = {"train": train, "eval": held_out}, changes

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=cast("Any", None), pad_id=PAD, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, split: str) -> Examples | None:
        return cast("Examples", Rows(self.splits[split], split)) if self.splits[split] else None

    @hookimpl
    def load_model(self) -> Model:
        return tiny_model(**self.changes)

    @hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        return request.folder


def composed(folder: Path, tiny: Tiny, plugins: Sequence[str], sections: Mapping[str, Any], **trainer: Any) -> Context:
    """A config with real packages; `given` in `plugins` is `GivenReference`."""
    config = {
        "model": {"name": "tiny"},
        "output": str(folder),
        "plugins": ["tiny", "adamw", "trainer", *plugins],
        "adamw": {"learning_rate": 1e-3},
        "trainer": {"epochs": 3.0, "batch": 16, "log_every": 3, "progress": "none", "device": "cpu", **trainer},
        **sections,
    }
    return compose(config, instances={"tiny": tiny, "given": GivenReference()})


def run(folder: Path, tiny: Tiny, plugins: Sequence[str] = ("given", "kto"), **settings: Any) -> Mapping[str, float]:
    """The figures of a run of three steps of all rows."""
    sections = {name: settings.pop(name) for name in ("kto", "packing", "reference") if name in settings}
    return execute(composed(folder, tiny, plugins, sections, **settings)).metrics


def source_of(
    folder: Path, tiny: Tiny, split: str = "train", runtime: Any = None, **settings: Any
) -> tuple[Any, Model, Context]:
    """The source of batches that a run would have, and its model."""
    sections = {name: settings.pop(name) for name in ("kto", "packing") if name in settings}
    plugins = settings.pop("plugins", ("given", "kto"))
    ctx = composed(folder, tiny, plugins, sections, **{"shuffle": False, **settings})
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    rows = ctx.call(hooks.build_dataset, ctx, ctx.processor, cast("Any", split))
    ctx.runtime = runtime or ctx.call(hooks.build_runtime, ctx)
    model = prepare_model(ctx, model_request(ctx))
    return ctx.call(hooks.build_batches, ctx, model, cast("Examples", rows)), model, ctx


def value_and_gradient(
    loss: Loss, step: Sequence[Batch], model: Model | None = None
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """The loss of a step, its figures, and its gradient: totals over counts of the whole step."""
    model = model or tiny_model()
    model.module.zero_grad()
    count, whole = sum(loss.counts(batch)["kto"] for batch in step), 0.0
    sums: dict[str, list[float]] = {}
    for batch in step:
        output = loss(batch, model.compute(model.module, batch, loss.needs))
        value = output.terms[0].total / count
        value.backward()
        whole += value.item()
        for term in output.metrics:
            assert not term.total.requires_grad
            of_name = sums.setdefault(term.name, [0.0, 0.0])
            of_name[0] += term.total.item()
            of_name[1] += float(term.count)
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.module.parameters()]
    return whole, {name: total / count for name, (total, count) in sums.items() if count}, gradient


def assert_same(left: tuple, right: tuple, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Value, figures that both have, and gradients are equal.

    A margin is as exact as the rewards it is the difference of; a gradient is compared by its norm, parameter by
    parameter: single entries are sums that may cancel.
    """
    torch.testing.assert_close(left[0], right[0], rtol=rtol, atol=atol)
    for name in left[1].keys() & right[1].keys():
        torch.testing.assert_close(left[1][name], right[1][name], rtol=rtol, atol=atol, msg=name)
    for ours, theirs in zip(left[2], right[2], strict=True):
        assert (ours - theirs).norm() <= rtol * theirs.norm() + atol
