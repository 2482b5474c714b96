"""A few training rows as batches, for initialisations that look at data before the first step.

Rows are chosen by the run's seed alone and cut to a bound, so that every process sees the same ones and none is asked
to attend to a long row. A stream gives them from its place and is put back there: training begins where it would have.

    B  rows    T  tokens of a row, padded on the right    N  trained tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from pegbox.errors import UserError
from pegbox.rows import UNTRAINED, Batch, Example, ExampleStream

from pegbox_lora.config import LoraConfig

if TYPE_CHECKING:
    import torch
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module

ROWS_OF_A_BATCH = 4
"""At least so many rows share a batch; more where they have fewer trained tokens than the largest rank."""


def chosen_rows(ctx: Context, settings: LoraConfig, dataset: Dataset) -> list[Example]:
    """At most `init_rows` rows, each cut to `init_tokens`, of a packed row its first document.

    Raises:
        UserError: no token of them is trained.
    """
    if isinstance(dataset, ExampleStream):
        place = dataset.state_dict()
        window = dataset.take(settings.init_rows)
        rows = [window[index] for index in range(len(window))]
        dataset.load_state_dict(place)
    else:
        source = ctx.rng("lora/init_rows").python()
        count = min(settings.init_rows, len(dataset))
        rows = [dataset[index] for index in source.sample(range(len(dataset)), count)]
    cut = [_cut(row, settings.init_tokens) for row in rows]
    used = [row for row in cut if _trained(row)]
    if not used:
        raise UserError(
            f"lora.init is '{settings.init}', but none of the {len(rows)} rows it looks at has a trained token",
            f"They are cut to {settings.init_tokens} tokens (lora.init_tokens).",
            "Raise lora.init_tokens or lora.init_rows.",
        )
    return used


def _cut(row: Example, bound: int) -> Example:
    end = min(bound, row.documents[0] if row.documents else len(row.input_ids))
    return replace(row, input_ids=row.input_ids[:end], labels=row.labels[:end], documents=())


def _trained(row: Example) -> int:
    return sum(int(label) != UNTRAINED for label in row.labels[1:])


def grouped(rows: Sequence[Example], tokens: int) -> list[list[Example]]:
    """Rows in groups that have at least `tokens` trained tokens each; what is left joins the last group."""
    groups: list[list[Example]] = [[]]
    for row in rows:
        groups[-1].append(row)
        if len(groups[-1]) >= ROWS_OF_A_BATCH and sum(map(_trained, groups[-1])) >= tokens:
            groups.append([])
    rest = groups.pop() if len(groups) > 1 else []
    groups[-1] += rest
    return groups


def tensors(rows: Sequence[Example], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and unshifted `labels`, each (B, T): what transformers' models take."""
    import torch

    def padded(lists: Sequence[Sequence[int]], fill: int) -> Tensor:
        made = [torch.as_tensor([int(value) for value in values]) for values in lists]
        return torch.nn.utils.rnn.pad_sequence(made, batch_first=True, padding_value=fill).to(device)

    return {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], UNTRAINED),
    }


def forward(model: Model, module: Module, given: dict[str, Tensor]) -> Tensor:
    """One forward as in training; the mean loss of the trained tokens."""
    import torch

    targets_BT = torch.full_like(given["labels"], UNTRAINED)
    targets_BT[:, :-1] = given["labels"][:, 1:]
    batch = Batch(
        input_ids_BT=given["input_ids"],
        targets_BT=targets_BT,
        trained_N=(targets_BT.flatten() != UNTRAINED).nonzero()[:, 0],
        attention_mask_BT=None if bool(given["attention_mask"].all()) else given["attention_mask"],
    )
    logps_N = model.compute(module, batch, frozenset({"logps"})).logps_N
    assert logps_N is not None
    return -logps_N.float().mean()


@contextmanager
def at_rest(module: Module) -> Iterator[None]:
    """No dropout inside; every part is in its own mode again afterwards, whatever was done to it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def on_device(module: Module, device: torch.device | None) -> Iterator[None]:
    """The module on the device of its process meanwhile: kernels that were patched in run there and nowhere else."""
    first = next(module.parameters()).device
    if device is None or first == device:
        yield
        return
    module.to(device)
    try:
        yield
    finally:
        module.to(first)


@contextmanager
def seeing(module: Module, names: Sequence[str]) -> Iterator[set[str]]:
    """The names of those modules that no forward has reached yet."""
    unseen = set(names)
    handles = [
        module.get_submodule(name).register_forward_hook(lambda *_, name=name: unseen.discard(name)) for name in names
    ]
    try:
        yield unseen
    finally:
        for handle in handles:
            handle.remove()
