"""`pegbox data build`: tokenizes the rows of a config ahead of time, on a machine without a GPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.plan import compose

from pegbox_data.config import DataConfig
from pegbox_data.loading import Datasets

if TYPE_CHECKING:
    from pegbox.context import Context


@dataclass(frozen=True)
class Built:
    """What was built: lines to print, the cache's folder, bytes on disk, seconds spent."""

    lines: Sequence[str]
    folder: Path
    bytes: int
    seconds: float

    def __str__(self) -> str:
        kept = f"kept {self.bytes / 2**20:,.1f} MiB in {self.folder}, ready after {self.seconds:.1f} s"
        return "\n".join([*self.lines, kept])


def build(config: str | Path, overrides: Sequence[str] = ()) -> Built:
    """Tokenize what a run of this config will need, so that it starts at once."""
    return build_for(compose(config, overrides))


def build_for(ctx: Context) -> Built:
    """The same for a composed run."""
    section = ctx.section(DataConfig)
    if section.streaming and not section.eval:
        raise ConfigError(
            "data.streaming is set: there is nothing to build",
            "A stream is tokenized while it is read.",
            "Start the run, or remove data.streaming.",
        )
    if section.cache == "off":
        raise ConfigError(
            "data.cache is off: there is no place to keep what is built",
            "The next run would build it again.",
            "Set data.cache: auto, or to a folder.",
        )
    began = time.perf_counter()
    with ctx.exit:
        ctx.purpose = "rows"  # the owner of load_processor need not prepare for a model
        ctx.processor = ctx.call(hooks.load_processor, ctx)
        datasets = Datasets(ctx, ctx.processor)
        for split in ("train", "eval"):
            if not (split == "train" and section.streaming):
                datasets.split(split)
        assert datasets.cache is not None
        return Built(datasets.report, datasets.cache.folder, datasets.kept_bytes(), time.perf_counter() - began)
