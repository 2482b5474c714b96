"""Stored names and names in memory: groups of stored tensors that transformers turns into weights together.

transformers may store the experts of a layer one by one and keep them stacked in memory; a group is then all experts of
a layer. Only a group with a weight that changes is converted: forth as `from_pretrained` does it, and back as
`save_pretrained` does it; the others are copied byte by byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import RunError
from torch import Tensor
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

if TYPE_CHECKING:
    from pegbox_merge.adapter import Adapter


LANGUAGE_MODEL = "language_model."
"""How transformers names the text part inside a model of several parts."""


@dataclass(frozen=True)
class Group:
    """Stored tensors, and the weights that they make."""

    sources: tuple[str, ...]
    pattern_of: dict[str, str]
    weights: tuple[str, ...]
    converter: WeightConverter | None

    def read(self, load: Callable[[str], Tensor], module: Any) -> dict[str, Tensor]:
        """The weights as they are in memory, by name."""
        if self.converter is None:
            return {self.weights[0]: load(self.sources[0])}
        converter = deepcopy(self.converter)
        for source in self.sources:
            converter.add_tensor(self.weights[0], source, self.pattern_of[source], load(source))
        made = converter.convert(self.weights[0], model=module, config=module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def write(self, weights: dict[str, Tensor], module: Any) -> Iterator[tuple[str, Tensor]]:
        """The same weights as they are stored: one tensor for each source, with its name.

        Raises:
            RunError: transformers' conversion back gives other names than those that were read.
        """
        if self.converter is None:
            yield self.sources[0], weights[self.weights[0]]
            return
        made = revert_weight_conversion(module, weights)
        prefix = f"{module.base_model_prefix}."
        known = set(self.sources)
        for name, tensor in made.items():
            stored = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in known), None)
            if stored is None:
                raise RunError(
                    f"the weight {self.weights[0]} is stored as {self.sources[0]}, but would be written as {name}",
                    "transformers' conversion of this model does not lead back.",
                    "Report it with the name of the model; peft's merge_and_unload is another way.",
                )
            known.remove(stored)
            yield stored, tensor
        if known:
            raise RunError(f"the stored tensors {', '.join(sorted(known)[:3])} were not written back")


def group(stored: Iterable[str], adapter: Adapter) -> list[Group]:
    """Every stored tensor in exactly one group, in the order of the files; names as `from_pretrained` reads them."""
    module: Any = adapter.module
    renamings = [one for one in adapter.conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in adapter.conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    meta = adapter.shapes
    found: dict[str, list[tuple[str, str | None]]] = {}
    for name in stored:
        renamed, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = name, None
        if renamed not in meta:
            # The language model alone was trained, out of one that also sees or hears.
            alone = name.replace(LANGUAGE_MODEL, "", 1)
            renamed, pattern = (alone if alone in meta and LANGUAGE_MODEL in name else f"stored:{name}"), None
        found.setdefault(renamed, []).append((name, pattern))
    # What leads back: `revert_weight_conversion` reads the conversions that were used from here.
    module._weight_conversions = [one for one in adapter.conversions if one.was_used()]
    twice = next((m for m in found.values() if len(m) > 1 and any(pattern is None for _, pattern in m)), None)
    if twice is not None:
        raise RunError(
            f"the stored tensors {twice[0][0]} and {twice[1][0]} would both be the same weight",
            "Their names do not tell which of them the run trained.",
            "Report it with the name of the model.",
        )
    return [_group(weight, members, by_pattern) for weight, members in found.items()]


def _group(weight: str, members: list[tuple[str, str | None]], by_pattern: dict[str, WeightConverter]) -> Group:
    sources = tuple(sorted((name for name, _ in members), key=dot_natural_key))
    patterns = {name: pattern for name, pattern in members if pattern is not None}
    if not patterns:
        return Group(sources, {}, (weight,), None)
    converter = by_pattern[members[0][1] or ""]
    first = converter.target_patterns[0]
    weights = tuple(weight.replace(first, target) for target in converter.target_patterns)
    return Group(sources, patterns, weights, converter)


def stored_name(weight: str, adapter: Adapter) -> str:
    """The name under which a weight that is in no file would be stored (an untied head)."""
    module: Any = adapter.module
    made = revert_weight_conversion(module, {weight: torch.empty(0)})
    return re.sub(r"^\.", "", next(iter(made)))
