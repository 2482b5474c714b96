"""The source `reasoning-gym`: tasks made by name, number and seed (arXiv:2505.24760), each with its verifier's entry.

Row i depends on the task, its settings, the seed and i alone. Columns: `prompt` and `question`, the same text;
`answer`; and `entry`, JSON, which the reward `reasoning-gym` judges by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pegbox.errors import ConfigError, DataError, did_you_mean
from pegbox.section import Section, setting
from pydantic import JsonValue


class Place(NamedTuple):
    """Where reading goes on (as the sources of the plugin data have it): `offset` rows."""

    offset: int = 0
    line: int = 0
    token: str = ""


START = Place()


@dataclass(frozen=True, slots=True)
class Entry:
    """One row, its number from 1, and the place behind it (as the sources of the plugin data have it)."""

    line: int
    row: Mapping[str, Any] | None
    error: DataError | None = None
    behind: Place = START


class GymRowsOptions(Section):
    """Options of the source `reasoning-gym`."""

    task: str = setting(..., "Name of the task, such as `chain_sum` or `countdown`.", min_length=1)
    rows: int = setting(1000, "How many rows there are.", unit="rows", ge=1)
    seed: int = setting(
        0, "Seed of the rows; row i depends on seed + i, so held-out rows take one at least `rows` away.", ge=0
    )
    settings: dict[str, JsonValue] = setting({}, "Settings of the task, as reasoning-gym names them.")
    instruction: str = setting("", "Text behind every question, after a blank line, such as how to answer.")


@dataclass(frozen=True)
class GymRows:
    """The rows of one task."""

    options: GymRowsOptions
    is_small: bool = True

    @property
    def name(self) -> str:
        return f"reasoning-gym/{self.options.task}"

    def read(self, start: Place = START) -> Iterator[Entry]:
        tasks = made(self.options)
        for number in range(start.offset, self.options.rows):
            one = tasks[number]
            question = (
                f"{one['question']}\n\n{self.options.instruction}" if self.options.instruction else one["question"]
            )
            row = {"prompt": question, "question": question, "answer": one["answer"], "entry": written(one)}
            yield Entry(number + 1, row, None, Place(number + 1, number + 1))

    def identity(self, memo: object) -> object:
        return self.sketch()

    def sketch(self) -> object:
        from importlib.metadata import version

        return ["reasoning-gym", version("reasoning-gym"), self.options.model_dump(mode="json")]


class GymSource:
    """Makes tasks; `path` of the data's entry is not looked at."""

    options = GymRowsOptions

    def parts(self, entry: object, options: GymRowsOptions, streaming: bool) -> Sequence[GymRows]:
        made(options)
        return [GymRows(options)]


def library() -> Any:
    """The package reasoning-gym; ConfigError where it is not installed."""
    try:
        import reasoning_gym  # type: ignore[import-untyped]
    except ImportError as error:
        raise ConfigError(
            "tasks of reasoning-gym need the package reasoning-gym",
            "It makes them, and judges answers.",
            "Type: pip install 'pegbox-reward-functions[reasoning-gym]'",
        ) from error
    return reasoning_gym


def made(options: GymRowsOptions) -> Any:
    """The tasks, which are made when they are asked for.

    Raises:
        ConfigError: there is no such task, or it does not take the settings.
    """
    gym = library()
    from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]

    if options.task not in DATASETS:
        raise ConfigError(
            f"reasoning-gym has no task '{options.task}'",
            did_you_mean(options.task, DATASETS, "It has:"),
            "Correct source_options.task.",
        )
    try:
        return gym.create_dataset(options.task, size=options.rows, seed=options.seed, **options.settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(
            f"the task '{options.task}' does not take its settings {dict(options.settings)}",
            f"reasoning-gym says: {error}",
            "Correct source_options.settings.",
        ) from error


def written(entry: Mapping[str, Any]) -> str:
    """An entry as JSON; what JSON does not know is an error here rather than a wrong verdict later."""
    try:
        return json.dumps(entry)
    except TypeError as error:
        raise DataError(
            f"an entry of the task '{entry['metadata']['source_dataset']}' cannot be kept",
            f"It is not plain data: {error}.",
            "Choose another task.",
        ) from error


gym_rows = GymSource()
