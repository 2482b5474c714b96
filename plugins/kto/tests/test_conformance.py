"""The plugin keeps the contract of plugins, its loss that of losses, and its wrapper that of wrappers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from kto_rows import GivenReference, Referenced, Rows, example_of, padded, random_answers, with_extras
from pegbox.context import Context
from pegbox.rows import Batch, Example
from pegbox.testing import LossConformance, PluginConformance, WrapperConformance, tiny_model
from pegbox.testing.tiny import collate


class OneStep:
    """A source of rows without another package (`pegbox.rows.RowSource`): all of them are one step."""

    total_steps, max_steps = 1, None

    def __init__(self, rows: Sequence[Example]) -> None:
        self.examples, self._left = Rows(rows), list(enumerate(rows))

    def take(self) -> Sequence[tuple[int, Example]]:
        taken, self._left = self._left, []
        return taken

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        return [collate(examples, tuple(range(len(examples))))]

    def __iter__(self) -> Iterator[Sequence[Batch]]:
        while taken := self.take():
            yield self.lay_out([example for _, example in taken])

    def describe(self, batch: Batch) -> str:
        return f"answers {batch.rows}"

    def state_dict(self) -> dict[str, object]:
        return {"left": len(self._left)}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """It is one step."""


class TestKto(PluginConformance, LossConformance, WrapperConformance):
    plugin = "kto"

    def batches(self) -> Sequence[Batch]:
        return [with_extras(padded(random_answers(3))), with_extras(padded(random_answers(2, seed=1)))]

    def result(self, hook: str) -> Any:
        return Referenced(OneStep([example_of(answer) for answer in random_answers(4)]), tiny_model().module)

    def arguments(self, ctx: Context) -> dict[str, Any]:
        return {"ctx": ctx, "model": tiny_model(placed=True)}


class TestApoZeroUnpaired(PluginConformance, LossConformance):
    plugin = "kto"
    config: ClassVar[Mapping[str, Any]] = {"loss": "apo_zero_unpaired"}
    instances: ClassVar[Mapping[str, object]] = {"given": GivenReference()}

    def batches(self) -> Sequence[Batch]:
        return [with_extras(padded(random_answers(3)))]
