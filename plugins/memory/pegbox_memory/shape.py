"""What the config says of a step: how many rows, how long they are, where and in what precision they are computed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError

from pegbox_memory.generation import GRPO, Generation, generation_of

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_memory.step import Precision

GIB = 1 << 30


@dataclass(frozen=True)
class Shape:
    """What a step is made of.

    Attributes:
        tokens: of a row, or of a bin of several; the first `prompt` of a plain row are not trained.
        generation: what is sampled at once in this process, before a step.
    """

    micro_batch: int
    micro_batches: int
    tokens: int
    packed: bool
    precision: Precision
    on_gpu: bool
    prompt: int = 0
    generation: Generation | None = None
    notes: tuple[str, ...] = ()


def shape_of(ctx: Context, tokens: int | None, micro_batch: int | None) -> Shape:
    """What the config says of a step.

    Raises:
        ConfigError: it does not say how long rows are, or how many are in a micro-batch.
    """
    sections = ctx.config.resolved()
    trainer, notes = sections.get("trainer", {}), []
    rows = micro_batch or trainer.get("micro_batch")
    if rows is None:
        raise ConfigError(
            "the config does not say how many rows a micro-batch has",
            "No section has a micro_batch.",
            "Type: --micro-batch 4",
        )
    length, prompt = _lengths(sections, tokens)
    on_gpu = trainer.get("device", "auto") != "cpu"
    precision = trainer.get("precision", "auto")
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    whole = trainer.get("batch") or rows * trainer.get("accumulation", 1)
    generation = None
    if online := sections.get(GRPO):
        # Rows of the data are prompts; those of a micro-batch are completions with their prompts.
        generation, told = generation_of(sections, prompt, whole, on_gpu=on_gpu)
        notes += told
        whole = whole * online["samples"] // online["steps_per_generation"]
    count = max(1, math.ceil(whole / rows))
    owner = next((job.plugins[0] for job in ctx.plan.jobs if job.hook == "place_model"), "trainer")
    if owner != "trainer":
        notes.append(f"'{owner}' places the model; what is counted is one process that holds all of it")
    import torch

    moved = sections.get("activations", {}).get("offload", "none")
    if moved != "none" and on_gpu and not torch.cuda.is_available():
        notes.append(f"activations.offload is {moved}; without CUDA here, what it moves is counted as if it stayed")
    packed = "packing" in sections
    return Shape(rows, count, length, packed, precision, on_gpu, prompt, generation, tuple(notes))


def _lengths(sections: Mapping[str, Any], tokens: int | None) -> tuple[int, int]:
    """Tokens of the longest row, or of a bin; and how many of them are a prompt, in an online run.

    Raises:
        ConfigError: nothing says it.
    """
    fits, longest = sections.get("packing", {}).get("length"), sections.get("data", {}).get("max_length")
    sampled = sections.get(GRPO, {}).get("max_completion_length", 0)
    if sampled and (prompt := tokens or longest or (fits or 0) - sampled) > 0:
        return max(fits or 0, prompt + sampled), prompt
    length = tokens or fits or longest
    if length is None or sampled:
        raise ConfigError(
            "the config does not say how long rows can be",
            "The memory of a step is that of its longest rows; data.max_length and packing.length are not set.",
            "Set data.max_length, or type: --tokens 4096",
        )
    return length, 0


def dtype_there(ctx: Context, shape: Shape) -> tuple[tuple[str, ...], list[str]]:
    """`model.dtype` as it would be on a GPU: without one here, `auto` would be float32."""
    import torch

    if ctx.config.run.model.dtype != "auto" or not shape.on_gpu or torch.accelerator.is_available():
        return (), []
    file = Path(ctx.config.path(ctx.config.run.model.name)) / "config.json"
    stored = None
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        stored = content.get("dtype") or content.get("torch_dtype")
    if stored in ("float32", "bfloat16", "float16"):
        return (f"model.dtype={stored}",), []
    return ("model.dtype=bfloat16",), ["model.dtype is auto and the weights are not here: taken as bfloat16"]


def device_bytes(device_gib: float | None, shape: Shape) -> int | None:
    if device_gib is not None:
        if device_gib <= 0:
            raise ConfigError(f"the device has {device_gib} GiB", "Nothing fits in that.", "Type: --device-gib 80")
        return round(device_gib * GIB)
    import torch

    if shape.on_gpu and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return None
