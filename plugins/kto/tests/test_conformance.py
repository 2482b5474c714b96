"""The plugin keeps the contract of plugins, its loss that of losses, and its wrapper that of wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from kto_rows import GivenReference, Tiny, example_of, padded, random_answers, source_of, with_extras
from pegbox.context import Context
from pegbox.rows import Batch
from pegbox.testing import LossConformance, PluginConformance, WrapperConformance, tiny_model


class TestKto(PluginConformance, LossConformance, WrapperConformance):
    plugin = "kto"

    def batches(self) -> Sequence[Batch]:
        return [with_extras(padded(random_answers(3))), with_extras(padded(random_answers(2, seed=1)))]

    def result(self, hook: str) -> Any:
        rows = [example_of(answer) for answer in random_answers(4)]
        return source_of(Path("unused"), Tiny(rows), plugins=("given", "sft"))[0]

    def arguments(self, ctx: Context) -> dict[str, Any]:
        return {"ctx": ctx, "model": tiny_model(placed=True)}


class TestApoZeroUnpaired(PluginConformance, LossConformance):
    plugin = "kto"
    config: ClassVar[Mapping[str, Any]] = {"loss": "apo_zero_unpaired"}
    instances: ClassVar[Mapping[str, object]] = {"given": GivenReference()}

    def batches(self) -> Sequence[Batch]:
        return [with_extras(padded(random_answers(3)))]
