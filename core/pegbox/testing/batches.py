"""Padding a batch and splitting it into micro-batches of single rows: what a loss must not notice.

Shape suffixes as in `pegbox.types`: B rows, T tokens of a row, N trained tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pegbox.rows import UNTRAINED, Batch, Extra
from pegbox.testing.libraries import torch

if TYPE_CHECKING:
    from torch import Tensor


def pad_batch(batch: Batch, columns: int) -> Batch:
    """The same batch with `columns` more columns of padding on the right; nothing in them is trained.

    Raises:
        ValueError: the batch is packed; its rows have no padding to lengthen.
    """
    if batch.cu_seqlens_S is not None:
        raise ValueError("a packed batch has no padding to lengthen")
    width = batch.input_ids_BT.shape[1]

    def shifted(places: Tensor | None) -> Any:
        return None if places is None else places // width * (width + columns) + places % width

    def wider(tensor: Tensor | None, value: int = 0) -> Any:
        return None if tensor is None else _pad(tensor, (0, columns), value)

    return replace(
        batch,
        input_ids_BT=wider(batch.input_ids_BT),
        targets_BT=wider(batch.targets_BT, UNTRAINED),
        trained_N=shifted(batch.trained_N),
        last_D=shifted(batch.last_D),
        attention_mask_BT=wider(batch.attention_mask_BT),
        position_ids_BT=wider(batch.position_ids_BT),
        extra={name: _pad_extra(extra, columns) for name, extra in batch.extra.items()},
    )


def _pad_extra(extra: Extra, columns: int) -> Extra:
    if extra.layout != "token":
        return extra
    inner = (0, 0) * (extra.value.ndim - 2)
    return replace(extra, value=_pad(extra.value, (*inner, 0, columns)))


def _pad(tensor: Tensor, amounts: tuple[int, ...], value: int = 0) -> Tensor:
    return torch().nn.functional.pad(tensor, amounts, value=value)


def split_batch(batch: Batch, rows: int = 1) -> list[Batch]:
    """The micro-batches of `rows` rows each, in order.

    Raises:
        ValueError: the batch is packed; documents of one row are not split apart.
    """
    if batch.cu_seqlens_S is not None:
        raise ValueError("a packed batch is not split: its documents lie in one row")
    return [_rows_of(batch, start, rows) for start in range(0, batch.input_ids_BT.shape[0], rows)]


def _rows_of(batch: Batch, start: int, rows: int) -> Batch:
    stop, width = start + rows, batch.input_ids_BT.shape[1]
    inside = (batch.trained_N >= start * width) & (batch.trained_N < stop * width)
    documents: Any = slice(start, stop)
    document_N, last_D = batch.document_N, batch.last_D
    if document_N is not None and last_D is not None:
        documents = (last_D >= start * width) & (last_D < stop * width)
        document_N, last_D = document_N[inside] - int(documents[: len(last_D)].nonzero()[:1].sum()), last_D[documents]

    def part(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[start:stop]

    def part_of_extra(extra: Extra) -> Extra:
        kept = {"trained": inside, "document": documents, "token": slice(start, stop)}.get(extra.layout)
        return extra if kept is None else replace(extra, value=extra.value[kept])

    return replace(
        batch,
        input_ids_BT=part(batch.input_ids_BT),
        targets_BT=part(batch.targets_BT),
        trained_N=batch.trained_N[inside] - start * width,
        document_N=document_N,
        last_D=None if last_D is None else last_D - start * width,
        sign_D=None if batch.sign_D is None else batch.sign_D[documents],
        attention_mask_BT=part(batch.attention_mask_BT),
        position_ids_BT=part(batch.position_ids_BT),
        rows=batch.rows[start:stop],
        extra={name: part_of_extra(extra) for name, extra in batch.extra.items()},
    )
