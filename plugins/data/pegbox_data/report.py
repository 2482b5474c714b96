"""What happened to rows: errors, and counts by reason with the line of the first case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pegbox.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from pegbox_data.config import DataConfig


@dataclass
class PartReport:
    """What happened to the rows of one part."""

    name: str
    read: int = 0
    bad: int = 0
    first: tuple[int, DataError] | None = None
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)

    def error(self, line: int, error: DataError) -> None:
        """A row that cannot be used."""
        self.bad += 1
        if self.first is None or line < self.first[0]:
            self.first = (line, error)

    def add(self, what: str, by: int, line: int) -> None:
        """Something worth printing."""
        number, first = self.counts.get(what, (0, line))
        self.counts[what] = (number + by, min(first, line))

    def count(self, what: str, lines: np.ndarray) -> None:
        """The same for rows with these lines, if there are any."""
        if len(lines):
            self.add(what, len(lines), int(lines.min()))

    def stop(self) -> None:
        """Raise for bad rows, or if there was none at all."""
        if self.first is not None:
            line, error = self.first
            more = f" (the first of {self.bad:,} bad rows among {self.read:,})" if self.bad > 1 else ""
            raise DataError(f"{self.name}:{line}: {error.what}{more}", error.why, error.next) from error
        if self.read == 0:
            raise DataError(
                f"{self.name} holds no rows",
                "The file is empty.",
                "Check the path, or how the file was written.",
            )

    def lines(self) -> Iterator[str]:
        """What is printed."""
        for what, (number, line) in self.counts.items():
            yield f"{self.name}: {number:,} {what} (first: line {line})"


def nothing_left(split: str, read: int, said: Iterable[str], config: DataConfig) -> DataError:
    """The error for a split all of whose rows were left out or held out, with the reasons that were counted."""
    reasons = [line for line in said if "dropped" in line]
    remedy = "Look at the rows, and at `fields` of their entries."
    if any("data.max_length" in line for line in reasons):
        remedy = f"Set data.max_length higher{', or data.overlong: truncate' * (config.overlong == 'drop')}."
    elif any("data.min_length" in line for line in reasons):
        remedy = "Set data.min_length lower."
    why = "\n".join(reasons) or "They are held out, or none of them is used."
    return DataError(f"no row is left in the split '{split}', of {read:,} that were read", why, remedy)


def summary(split: str, lengths: np.ndarray, trained: int) -> str:
    """`train: 2 rows, 40 tokens, 12 of them trained (30%), longest row 21`."""
    tokens = int(lengths.sum())
    return (
        f"{split}: {len(lengths):,} rows, {tokens:,} tokens, {trained:,} of them trained "
        f"({trained / tokens:.0%}), longest row {int(lengths.max()):,}"
    )
