"""Rows that are longer than the model reads stop a run before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Example
from pegbox_hf.context_length import positions
from transformers import LlamaConfig, MambaConfig

YARN = {"rope_type": "yarn", "factor": 4.0}


class Rows:
    """Owns `build_dataset`: rows of documents of these lengths."""

    split, fingerprint = "train", "rows"

    def __init__(self, *rows: tuple[int, ...], known: bool) -> None:
        self.rows = rows
        if known:
            self.lengths = [sum(row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        documents = self.rows[index]
        ids = [5] * sum(documents)
        return Example(input_ids=ids, labels=ids, documents=documents if len(documents) > 1 else ())

    def describe(self, index: int) -> str:
        return f"rows.jsonl:{index + 1}"

    @hookimpl
    def build_dataset(self) -> Any:
        return self


def look(folder: Path, rows: Rows, hf: dict[str, Any] | None = None, purpose: Any = "run") -> Any:
    """What `build_dataset` gives for a model of 128 positions; there is its config and nothing else of it."""
    shape = folder.parent / "shape"
    shape.mkdir(exist_ok=True)
    (shape / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = {"model": {"name": str(shape)}, "plugins": ["hf", "rows"], "hf": hf or {}}
    ctx = compose(config, instances={"rows": rows})
    ctx.purpose, ctx.processor = purpose, None  # type: ignore[assignment]
    return ctx.call(hooks.build_dataset, ctx, ctx.processor, "train")


@pytest.mark.parametrize("known", [False, True])
def test_rows_longer_than_the_context_are_an_error(folder: Path, known: bool) -> None:
    fits = Rows((128,), (128, 100, 128), known=known)
    assert look(folder, fits) is fits
    with pytest.raises(ConfigError, match=r"2 of 4 rows(.|\n)*rows.jsonl:3, has 200(.|\n)*Set data.max_length to 128"):
        look(folder, Rows((128,), (100, 129), (200,), (70, 70), known=known))


def test_a_model_that_is_made_to_read_more_may(folder: Path) -> None:
    for hf in ({"rope_scaling": YARN}, {"config_overrides": {"max_position_embeddings": 512}}):
        assert look(folder, Rows((512,), known=True), hf)
        with pytest.raises(ConfigError, match="the 512 tokens"):
            look(folder, Rows((513,), known=True), hf)


def test_rows_that_no_model_is_loaded_for_may_have_any_length(folder: Path) -> None:
    assert look(folder, Rows((999,), known=True), purpose="rows")


@pytest.mark.parametrize(
    ("rope", "reads"),
    [
        ({}, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({**YARN, "original_max_position_embeddings": 1024}, 4096),
        ({**YARN, "original_max_position_embeddings": 4096}, 16384),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 256}, 4096),
    ],
    ids=str,
)
def test_scaled_positions_are_read_too(rope: dict[str, Any], reads: int) -> None:
    config = LlamaConfig(max_position_embeddings=4096)
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "default", **rope}
    assert positions(config) == reads


def test_a_model_without_positions_reads_any_length() -> None:
    assert positions(MambaConfig()) is None
