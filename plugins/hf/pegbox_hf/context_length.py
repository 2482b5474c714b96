"""Rows that are longer than the model reads, seen before its weights are loaded.

A model reads `max_position_embeddings` positions, or as many as its rotary scaling stretches those of pretraining to
(Peng et al. 2023, arXiv:2309.00071). Each document of a row has positions of its own, so documents are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError
from pegbox.rows import ExampleStream

from pegbox_hf.opening import open_config
from pegbox_hf.quiet import quiet

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset, Examples
    from transformers import PretrainedConfig


def refuse_longer(ctx: Context, rows: Dataset) -> None:
    """Raise ConfigError if a document of a row is longer than the run's model reads; of a stream nobody knows."""
    if isinstance(rows, ExampleStream):
        return
    model = ctx.config.run.model
    with quiet(downloads=True):
        limit = positions(open_config(ctx, model.name, model.revision, convert=False).config)
    found = list(_longer(rows, limit)) if limit is not None else []
    if found:
        longest, at = max(found)
        raise ConfigError(
            f"{len(found):,} of {len(rows):,} rows ({rows.split}) are longer than the {limit:,} tokens that "
            f"{model.name} reads; the longest, {rows.describe(at)}, has {longest:,}",
            "Beyond that it was not trained, and some models fail there.",
            f"Set data.max_length to {limit} or less; data.overlong says what becomes of longer rows. To have it read "
            "more, set hf.rope_scaling, or hf.config_overrides: {max_position_embeddings: ...}.",
        )


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens a model with this config reads; None: it does not say."""
    text = config.get_text_config()
    said = getattr(text, "max_position_embeddings", None)
    if not isinstance(said, int) or said < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    by_layer = [inner for inner in rope.values() if isinstance(inner, Mapping)] or [rope]
    stretched = [(one.get("original_max_position_embeddings") or said) * (one.get("factor") or 1) for one in by_layer]
    return max(said, *map(int, stretched))


def _longer(rows: Examples, limit: int) -> Iterator[tuple[int, int]]:
    """The longest document of each row that has one of more than `limit` tokens, and the row's index."""
    known = getattr(rows, "lengths", None)
    for at in range(len(rows)):
        if known is None or known[at] > limit:
            example = rows[at]
            longest = max(example.documents, default=len(example.input_ids))
            if longest > limit:
                yield longest, at
