"""Which verdict belongs to which mark, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from pegbox.errors import ConfigError, DataError
from pegbox.rows import UNTRAINED, Example
from pegbox.testing import TinyExamples
from pegbox_prm.config import PrmConfig
from pegbox_prm.verdicts import require_verdicts, verdicts_of


def row(marks: Sequence[int], **columns: Any) -> Example:
    ids = list(range(10))
    return Example(input_ids=ids, labels=[at if at in marks else UNTRAINED for at in ids], columns=columns)


def test_verdicts_follow_the_marks() -> None:
    assert verdicts_of(row([2, 5, 9], labels=[True, False, True]), "row", PrmConfig()) == [1, 0, 1]
    assert verdicts_of(row([4], steps=[0]), "row", PrmConfig(column="steps")) == [0]


@pytest.mark.parametrize("marks", [[], [2], [2, 5], [1, 2, 5, 9]])
def test_a_row_with_another_number_of_marks_is_refused(marks: list[int]) -> None:
    with pytest.raises(DataError, match=rf"a\.jsonl:3 has 3 verdicts and {len(marks)} marked tokens"):
        verdicts_of(row(marks, labels=[True, True, False]), "a.jsonl:3", PrmConfig())


@pytest.mark.parametrize("columns", [{}, {"labels": []}, {"labels": "10"}, {"labels": [2, 0]}, {"labels": True}])
def test_rows_without_verdicts_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1: the column 'labels' is") as raised:
        verdicts_of(row([2, 5], **columns), "a.jsonl:1", PrmConfig())
    assert ("format: steps" in raised.value.next) == (not columns)


def test_rows_are_looked_at_before_anything_else() -> None:
    with pytest.raises(DataError, match="text 0: the column 'labels' is None"):
        require_verdicts(TinyExamples(["one"]), PrmConfig())


def test_streams_are_refused() -> None:
    class Stream(TinyExamples):
        def take(self, rows: int) -> TinyExamples:
            raise AssertionError

        def state_dict(self) -> dict[str, object]:
            return {}

        def load_state_dict(self, state_dict: dict[str, object]) -> None:
            """Nothing is kept."""

    with pytest.raises(ConfigError, match="the train rows are a stream"):
        require_verdicts(Stream(["one"]), PrmConfig())
