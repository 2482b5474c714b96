"""What packing says when a run starts, and the models it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError

from pegbox_packing.packed import PackedRows

if TYPE_CHECKING:
    from pegbox.types import Job, Model

LEAKS = {
    "linear_attention": "its linear attention layers carry a state over the whole row",
    "recurrent": "it has layers that carry a state over the whole row",
}
"""Traits of models in which a document would see the one before it, whatever the mask."""


def refuse_models(model: Model) -> None:
    """Raise if documents of one row could see each other in this model.

    Raises:
        ConfigError: a layer of the model mixes the tokens of a row in another way than by masked attention.
    """
    for trait, why in LEAKS.items():
        if trait in model.traits:
            raise ConfigError(
                f"{model.name} cannot be packed: {why}",
                "Documents that share a row must not see each other.",
                "Remove packing from plugins.",
            )


def fullness(job: Job) -> Iterator[str]:
    """How full the bins of the first epoch are, for each split whose rows are packed and indexed."""
    for source in (job.train, job.eval):
        rows = source.examples if source is not None else None
        if isinstance(rows, PackedRows):
            bins = rows.bins(range(len(rows)))
            full = rows.lengths.sum() / (len(bins) * rows.capacity)
            boxes = f"{len(bins):,} {'bin' if len(bins) == 1 else 'bins'} of {rows.capacity:,} tokens"
            yield f"{rows.split}: {len(rows):,} rows in about {boxes}, {full:.1%} full"
