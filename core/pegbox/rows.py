"""What data becomes on its way into a model: rows, their documents, batches, and the sources of both.

A *document* is a run of tokens that attention never leaves. A row of data is one document, or several that belong
together: the two answers of a preference, which are never separated. Shape suffixes as in `types.py`, and

    D  documents of a micro-batch that came from rows (padding is none)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, fields, replace
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from pegbox.record import Json, Record, Stateful

if TYPE_CHECKING:
    from torch import Tensor, device

UNTRAINED = -100
"""The target of a position that is not trained (torch's and transformers' ignore index)."""

Split = Literal["train", "eval"]


class Example(Record):
    """One tokenized row of T tokens, and columns of its source row by name.

    Labels are not shifted: `labels[t]` is `input_ids[t]` where token t is trained, else -100.

    Attributes:
        documents: lengths of the documents of this row, summing to T; empty: the row is one document.
        signs: for each document +1, an answer that is wanted, -1, one that is not, or 0, neither; empty: the data does
            not say. A preference is one row with the signs (1, -1).
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    documents: tuple[int, ...] = ()
    signs: tuple[int, ...] = ()
    columns: Mapping[str, Json] = field(default_factory=dict)


class Examples(Protocol):
    """The rows of one split: indexable, fixed order, the same on every rank."""

    split: Split
    fingerprint: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example: ...
    def describe(self, index: int) -> str:
        """Where row `index` came from, for messages: `data/train.jsonl:17`."""


@runtime_checkable
class PackedExamples(Examples, Protocol):
    """Examples of which several share a row of a batch: the owner of `build_batches` joins those of a bin."""

    def bins(self, order: Sequence[int]) -> Sequence[Sequence[int]]:
        """The rows of `order`, each in exactly one bin; a function of `order` and nothing else."""

    def fit(self, lengths: Sequence[int]) -> Sequence[Sequence[int]]:
        """Positions in `lengths`, tokens of rows made elsewhere, each in exactly one bin."""


@runtime_checkable
class ExampleStream(Stateful, Protocol):
    """Rows that do not fit in memory, the same on every rank. Its state is the place after those taken."""

    split: Split
    fingerprint: str

    def take(self, rows: int) -> Examples:
        """The next rows, at most so many; none: the split has ended. A training split may begin anew without end."""


Dataset = Examples | ExampleStream


class Extra(Record):
    """A named tensor of a batch beyond tokens, with its rule for joining and sharding."""

    value: Tensor
    layout: Literal["document", "token", "trained", "global"]


class Batch(Record):
    """One micro-batch of one rank, padded on the right. `rows` are dataset indices: an error can name them.

    Attributes:
        document_N: which document each trained position is in; documents stand in the order of `rows`.
        last_D: flat index of the last token of each document.
        sign_D: see `Example.signs`; None: no row says.
        extra: further tensors; numbers among the kept columns of rows are there as `document`, one for each document.
    """

    input_ids_BT: Tensor
    targets_BT: Tensor
    trained_N: Tensor
    attention_mask_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    cu_seqlens_S: Tensor | None = None
    max_seqlen: int | None = None
    document_N: Tensor | None = None
    last_D: Tensor | None = None
    sign_D: Tensor | None = None
    rows: tuple[int, ...] = ()
    extra: Mapping[str, Extra] = field(default_factory=dict)

    @property
    def trained_tokens(self) -> int:
        """N; known on the host, no device is asked."""
        return int(self.trained_N.shape[0])

    def to(self, device: device) -> Batch:
        """The same batch on another device; copies do not wait."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {key: value.to(device, non_blocking=True) for key, value in values.items() if hasattr(value, "to")}
        extra = {key: replace(item, value=item.value.to(device, non_blocking=True)) for key, item in self.extra.items()}
        return replace(self, **moved, extra=extra)


class BatchSource(Stateful, Protocol):
    """Batches of one split. Iterating yields one optimizer step at a time: this rank's micro-batches of it.

    A training source goes on where its state says; one for evaluation yields every row once at each iteration.
    """

    examples: Dataset
    """The rows it draws from."""
    total_steps: int | None
    """Optimizer steps of the whole run from step 0, as the config asks; None for an evaluation source."""

    def __iter__(self) -> Iterator[Sequence[Batch]]: ...
    def describe(self, batch: Batch) -> str:
        """Where the rows of a batch came from, for messages."""


@runtime_checkable
class RowSource(BatchSource, Protocol):
    """A training source that also hands out its rows, and lays out others: online methods wrap one."""

    max_steps: int | None
    """Optimizer steps that the config ends the run after; None: it ends with the data."""

    def take(self) -> Sequence[tuple[int, Example]]:
        """The rows of the next step over all ranks, with their numbers, and move on; none: the data has ended."""

    def lay_out(self, examples: Sequence[Example]) -> Sequence[Batch]:
        """This rank's micro-batches of examples that every rank holds; `Batch.rows` are positions among them."""
