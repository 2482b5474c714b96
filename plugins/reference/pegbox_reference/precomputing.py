"""One pass over the rows of a split before training, kept on disk and read back by row.

The folder's name is a digest of everything the values depend on: the rows, the weights that compute them (their bytes,
not their name), the arithmetic, and whether an adapter is switched off. So a later run of the same data and model reads
what is there, and a changed one computes anew. All processes compute; the first one writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch
from pegbox.errors import ConfigError, RunError
from pegbox.rows import UNTRAINED, Example, RowSource

from pegbox_reference.config import ReferenceConfig
from pegbox_reference.stored import FORMAT, Row, Stored, Writer, rows_of

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox.context import Context
    from pegbox.rows import Batch, BatchSource, Examples
    from torch import Tensor, nn

    from pegbox_reference.computed import Computed

WINDOW = 256
"""Rows for each process that are computed, and then written, at a time."""
LOOKED_AT = 16
"""Rows that are looked at to tell prompts from rows with answers."""


class Precomputed:
    """Log-probabilities of batches of a dataset, read from the disk."""

    def __init__(self, stored: Stored, pin: bool) -> None:
        self._stored, self._pin = stored, pin
        self.folder = stored.folder

    def __call__(self, batches: Sequence[Batch]) -> list[Tensor]:
        made = [torch.from_numpy(self._stored.logps(batch)) for batch in batches]
        return [logps_N.pin_memory() for logps_N in made] if self._pin else made


def precomputed(ctx: Context, source: BatchSource, dataset: Examples, computed: Computed) -> Precomputed:
    """Log-probabilities of all rows of a dataset: read if an earlier run computed them, computed if not.

    Args:
        ctx: of the run, after its runtime was built.
        source: lays rows out as the run does.
        dataset: its rows, indexed.
        computed: the reference.

    Raises:
        ConfigError: the rows that are trained are yet to be made.
    """
    lay_out: Callable[[Sequence[Example]], Sequence[Batch]] | None = getattr(source, "lay_out", None)
    made_later = lay_out is None or (dataset.split == "train" and not isinstance(source, RowSource))
    if made_later or _prompts(dataset):
        raise ConfigError(
            "reference.how is precomputed, and the rows that are trained are made during the run",
            "What is not there before training cannot be computed before it.",
            "Set reference.how to copy or adapter.",
        )
    assert lay_out is not None, "it was looked for"
    folder = ctx.config.path(ctx.section(ReferenceConfig).cache) / _key(ctx, dataset, computed)
    first = ctx.runtime.rank == 0
    with _lock(folder) if first else nullcontext():
        if not ctx.runtime.gather_objects(folder.is_dir())[0]:
            _compute(ctx, lay_out, dataset, computed, folder)
        ctx.runtime.barrier()
    if not folder.is_dir():
        raise RunError(
            f"process {ctx.runtime.rank} does not see {folder}, which the first one has written",
            "All processes read what was precomputed.",
            "Set reference.cache to a folder that all machines share.",
        )
    return Precomputed(Stored(folder), pin=ctx.runtime.device.type == "cuda")


def _prompts(dataset: Examples) -> bool:
    """Whether rows have nothing to train, because their answers are yet to be made."""
    first = [dataset[row].labels for row in range(min(len(dataset), LOOKED_AT))]
    return all(label == UNTRAINED for labels in first for label in labels)


def _lock(folder: Path) -> AbstractContextManager[object]:
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _compute(
    ctx: Context,
    lay_out: Callable[[Sequence[Example]], Sequence[Batch]],
    dataset: Examples,
    computed: Computed,
    folder: Path,
) -> None:
    """Compute and write window after window, from the first row that is not written yet."""
    runtime, first = ctx.runtime, ctx.runtime.rank == 0
    writer = Writer(folder) if first else None
    done = runtime.gather_objects(writer.rows if writer is not None else 0)[0]
    assert isinstance(done, int), "it was a number of rows"
    rows, step = len(dataset), WINDOW * runtime.world_size
    if first and done:
        ctx.log.info("reference: going on with row %d of %d in %s", done, rows, folder)
    for start in range(done, rows, step):
        examples = [dataset[row] for row in range(start, min(start + step, rows))]
        own = _window(lay_out(examples), examples, computed)
        window = dict(pair for part in runtime.gather_objects(own) for pair in part)  # type: ignore[attr-defined]
        if writer is not None:
            writer.append(window[at] for at in range(len(examples)))
            ctx.log.info("reference: %d of %d rows of the %s split", writer.rows, rows, dataset.split)
    if writer is not None:
        writer.finish()


def _window(batches: Sequence[Batch], examples: Sequence[Example], computed: Computed) -> list[tuple[int, Row]]:
    """This process's rows of a window, by their place in it."""
    values = [logps_N.cpu().numpy() for logps_N in computed(batches)]
    found: list[tuple[int, Row]] = []
    for batch, logps_N in zip(batches, values, strict=True):
        documents = [len(examples[at].documents) or 1 for at in batch.rows]
        found += zip(batch.rows, rows_of(batch, documents, logps_N) if batch.rows else (), strict=True)
    return found


def _key(ctx: Context, dataset: Examples, computed: Computed) -> str:
    """The name of the folder, the same on every process."""
    parts = ctx.runtime.gather_objects(weights_digest(computed.model.module, whole=not computed.switches))
    identity = {
        "format": FORMAT,
        "rows": [dataset.split, dataset.fingerprint, len(dataset)],
        "model": computed.model.name,
        "weights": list(dict.fromkeys(parts)),
        "precision": ctx.runtime.precision,
        "adapter": "off" if computed.switches else computed.model.adapter,
    }
    return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


def weights_digest(module: nn.Module, *, whole: bool) -> str:
    """A digest of names, types and bytes of parameters; not `whole`: of an adapter's base, which is not trained."""
    digest = blake2b(digest_size=16)
    for name, parameter in sorted(module.named_parameters()):
        if whole or not parameter.requires_grad:
            value = parameter.detach()
            local = value.to_local() if hasattr(value, "to_local") else value
            digest.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
            digest.update(local.contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
