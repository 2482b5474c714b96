"""Merging a run: what is written is planned, then written group by group, then appears whole.

The largest thing in memory is one group: a weight, or the stacked experts of one layer, as stored and once more while
it is merged. Output is written into a hidden folder beside its place and renamed when everything is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import UserError
from torch import Tensor

from pegbox_merge.adapter import Adapter, lacks_rows, open_adapter
from pegbox_merge.conversion import Group, group, stored_name
from pegbox_merge.side_files import copy_side_files, name_classifier, tokenizer_of, write_config
from pegbox_merge.stored import Entry, Stored
from pegbox_merge.verdict import RECORD, write_record
from pegbox_merge.writing import Shape, ShardWriter

if TYPE_CHECKING:
    from pegbox_merge.runs import Trained


@dataclass(frozen=True)
class MergeRequest:
    """Where to and how: `dtype` is `stored` or the name of a data type."""

    folder: Path
    dtype: str = "stored"
    max_shard_size: str = "5GB"


@dataclass(frozen=True)
class Merged:
    """A folder that was written.

    Attributes:
        dtype: the data type of the merged weights.
        tensors: stored tensors; `changed`: how many of them differ from the base's.
    """

    folder: Path
    dtype: str
    tensors: int
    changed: int
    shards: int


@dataclass(frozen=True)
class Work:
    """The plan of one merge: groups that change and copies, by stored names; and weights that get a name of their own.

    Attributes:
        untied: weights that were the same as another one, and no longer are: their stored name and that other weight.
        new: weights that the base lacks, and their stored names: the head of a model that learnt to classify.
    """

    groups: list[Group]
    untied: dict[str, tuple[str, str]]
    new: dict[str, str]
    skipped: frozenset[str]


def write_merged(trained: Trained, request: MergeRequest) -> Merged:
    """Merge the adapter into its base and write the model's folder, which appears complete or not at all.

    Raises:
        UserError: the folder exists, or the adapter cannot be merged.
    """
    folder = request.folder.expanduser().absolute()
    if folder.exists():
        raise UserError(
            f"{folder} exists", "Nothing is overwritten.", "Remove it, or give another one: --output FOLDER"
        )
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    hidden.mkdir(parents=True)
    try:
        done = _write(trained, request, hidden, folder)
        hidden.rename(folder)
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return done


def _write(trained: Trained, request: MergeRequest, hidden: Path, folder: Path) -> Merged:
    base_config = json.loads((trained.base_files / "config.json").read_text(encoding="utf-8"))
    usual = _usual_dtype(base_config)
    stored = Stored.open(trained.base_files, usual)
    adapter = open_adapter(trained)
    work = _plan(stored, adapter, classifies=trained.options.classify is not None)
    wanted = None if request.dtype == "stored" else getattr(torch, request.dtype)
    shapes = _shapes(stored, adapter, work, wanted)
    writer = ShardWriter.open(hidden, shapes, request.max_shard_size)
    try:
        changed = _fill(writer, stored, adapter, work)
        writer.close()
    finally:
        writer.abort()
    dtype = str(wanted or usual).removeprefix("torch.")
    if trained.options.classify is not None:
        name_classifier(base_config, adapter.module, tokenizer_of(trained.folder, trained.base_files))
    write_config(base_config, hidden, dtype=dtype, untied=bool(work.untied), module=adapter.module)
    copy_side_files(trained.folder, trained.base_files, hidden)
    write_record(
        hidden / RECORD,
        {
            "status": "unchecked",
            "run": str(trained.folder),
            "base": trained.base,
            "revision": trained.revision,
            "onto": trained.onto,
            "dtype": dtype,
            "tensors": len(shapes),
            "changed": changed,
            "untied": sorted(work.untied),
            "adapter": _summary(adapter.config),
            "versions": {name: version(name) for name in ("pegbox-merge", "peft", "transformers", "torch")},
        },
    )
    return Merged(folder, dtype, len(shapes), changed, writer.shards)


def _plan(stored: Stored, adapter: Adapter, *, classifies: bool) -> Work:
    groups = group(stored.entries, adapter)
    source_of = {weight: one for one in groups for weight in one.weights}

    def read(weight: str) -> Tensor:
        return source_of[weight].read(stored.read, adapter.module)[weight]

    lost = adapter.changed - source_of.keys() - adapter.tied.keys()
    new = {name: stored_name(name, adapter) for name in sorted(lost & adapter.replaced.keys()) if classifies}
    if lost := lost - new.keys():
        raise UserError(
            f"the base has no stored tensor for {', '.join(sorted(lost)[:3])}",
            "The adapter changes a weight that is not in the checkpoint.",
            "Check that --base is the model that the run was trained on.",
        )
    untied: dict[str, tuple[str, str]] = {}
    skipped: set[str] = set()
    if classifies:
        # A head for tokens, which the classifying model has no place for.
        skipped.update(name for one in groups if one.weights[0] not in adapter.shapes for name in one.sources)
    for target, source in adapter.tied.items():
        own = source_of.get(target)
        if adapter.tied_after(target, source, read):
            skipped.update(own.sources if own is not None and target != source else ())
        else:
            untied[target] = (own.sources[0] if own else stored_name(target, adapter), source)
            skipped.update(own.sources if own is not None else ())
    return Work(groups, untied, new, frozenset(skipped))


def _shapes(stored: Stored, adapter: Adapter, work: Work, wanted: torch.dtype | None) -> dict[str, Shape]:
    """What will be written; a weight that was trained in full may have another shape than the base's (new tokens)."""

    def shape(dtype: torch.dtype, size: tuple[int, ...]) -> Shape:
        return Shape(wanted if wanted is not None and dtype.is_floating_point else dtype, size)

    found: dict[str, Shape] = {}
    for one in work.groups:
        for name in one.sources:
            if name in work.skipped:
                continue
            entry = stored.entries[name]
            found[name] = shape(entry.dtype, _size(one, entry, adapter))
    for target, (name, source) in work.untied.items():
        like = next(one for one in work.groups if source in one.weights)
        size = adapter.replaced[target].shape if target in adapter.replaced else adapter.shapes[target]
        found[name] = shape(stored.entries[like.sources[0]].dtype, tuple(size))
    for weight, name in work.new.items():
        found[name] = shape(adapter.replaced[weight].dtype, tuple(adapter.replaced[weight].shape))
    return found


def _size(one: Group, entry: Entry, adapter: Adapter) -> tuple[int, ...]:
    """The shape that a stored tensor will have: embeddings may have grown by the tokens that the run added."""
    weight = one.weights[0]
    if one.converter is not None or weight not in adapter.shapes:
        return entry.shape
    if weight in adapter.replaced:
        return tuple(adapter.replaced[weight].shape)
    if tuple(adapter.shapes[weight]) != entry.shape and weight not in adapter.changed:
        raise lacks_rows(weight, entry.shape, adapter.shapes[weight])
    return tuple(adapter.shapes[weight])


def _fill(writer: ShardWriter, stored: Stored, adapter: Adapter, work: Work) -> int:
    changed = 0
    for one in work.groups:
        if one.sources[0] in work.skipped:
            continue
        touched = adapter.changed.intersection(one.weights)
        for name, tensor in _tensors(one, stored, adapter, touched):
            writer.write(name, tensor.to(writer.shapes[name].dtype))
            changed += bool(touched)
    for target, (name, source) in work.untied.items():
        like = next(one for one in work.groups if source in one.weights)
        weight = like.read(stored.read, adapter.module)[source]
        tensor = adapter.merged(target, weight) if target in adapter.changed else weight
        writer.write(name, tensor.to(writer.shapes[name].dtype))
        changed += target in adapter.changed
    for weight, name in work.new.items():
        writer.write(name, adapter.merged(weight, adapter.replaced[weight]).to(writer.shapes[name].dtype))
    return changed + len(work.new)


def _tensors(one: Group, stored: Stored, adapter: Adapter, touched: set[str]) -> Iterator[tuple[str, Tensor]]:
    if not touched:
        yield from ((name, stored.read(name)) for name in one.sources)
        return
    weights = one.read(stored.read, adapter.module)
    for name in touched:
        weights[name] = adapter.merged(name, weights[name])
    yield from one.write(weights, adapter.module)


def _usual_dtype(config: dict[str, Any]) -> torch.dtype:
    """What the config says the weights are; bfloat16 if it does not say."""
    text = config.get("text_config") or {}
    names = (source.get(key) for source in (config, text) for key in ("dtype", "torch_dtype"))
    return getattr(torch, next((name for name in names if name), "bfloat16"))


def _summary(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "modules_to_save", "target_parameters")
    return {key: value for key in keys if (value := config.get(key))}
