"""Training single rows of an embedding, exactly: every other row keeps its bits.

The gradient of the other rows is set to zero before anything reads it, and the parameter is not decayed. An optimizer
that works row by row or element by element then leaves these rows alone: an average of zeros is zero. Whether the
optimizer of the run does so is checked after its first step and before the export, by a checksum of the bits.

The optimizer still keeps its state for all rows; with an adapter, `lora.tokens` keeps the rows alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.errors import RunError, UserError, did_you_mean
from pegbox.types import GroupOptions

from pegbox_freeze.config import FreezeConfig
from pegbox_freeze.selection import names_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Stepped
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Parameter


class TrainedRows:
    """The rows that are trained, of each parameter by its name in the model."""

    def __init__(self, rows: dict[str, list[int]], parameters: dict[str, Parameter]) -> None:
        self._rows, self._parameters = rows, parameters
        self._sums: dict[str, Tensor] = {}
        self._first = -1
        for name, parameter in parameters.items():
            parameter.register_hook(_Masked(rows[name], parameter.shape[0]))

    @classmethod
    def find(cls, ctx: Context, model: Model) -> TrainedRows | None:
        """The rows that the config names, with their gradients bound to them; None if it names none.

        Raises:
            UserError: a token is unknown or beyond the rows, or the parameter has no rows of tokens.
        """
        settings = ctx.section(FreezeConfig)
        rows: dict[str, list[int]] = {}
        parameters = {}
        for names, parameter in names_of(model):
            written = [e for e in settings.rows if any(re.search(e, name) for name in names)]
            if not written:
                continue
            if len(written) > 1:
                raise UserError(
                    f"freeze.rows: {written[0]!r} and {written[1]!r} both match {names[0]}",
                    "Which rows are trained must be said once.",
                    "Write one expression with all its tokens.",
                )
            _require_rows(model, names[0], parameter, written[0])
            if not parameter.is_meta:
                rows[names[0]] = sorted({_row(ctx, token, parameter) for token in settings.rows[written[0]]})
                parameters[names[0]] = parameter
        return cls(rows, parameters) if rows else None

    def groups(self) -> Sequence[GroupOptions]:
        """Without decay: it would shrink every row."""
        return [GroupOptions(pattern=f"^{re.escape(name)}$", weight_decay=0.0) for name in self._rows]

    def begin(self, model: Model, step: int) -> None:
        """Remember the bits of the rows that must stay.

        Raises:
            RunError: the parameter was replaced after it was loaded, so its gradient is not bound to rows.
        """
        now = dict(model.module.named_parameters())
        for name, parameter in self._parameters.items():
            if now.get(name) is not parameter:
                raise RunError(
                    f"{name} was replaced after the model was loaded, so freeze.rows no longer holds for it",
                    "All of its rows would be trained. Sharded placements do this.",
                    "Train on one device or with DDP, or train the whole parameter with freeze.train.",
                )
            self._sums[name] = self._checksum(name, parameter)
        self._first = step + 1

    def after_first_step(self, event: Stepped) -> None:
        """Check once that the optimizer leaves the other rows alone."""
        if event.step == self._first:
            self.check(event.model)

    def check(self, model: Model) -> None:
        """Check the bits; waits for the device.

        Raises:
            RunError: a row that is not trained has changed.
        """
        now = dict(model.module.named_parameters())
        for name, before in self._sums.items():
            if not bool((self._checksum(name, now[name]) == before).all()):
                raise RunError(
                    f"rows of {name} that freeze.rows does not name have changed",
                    "The optimizer of this run moves rows whose gradient is zero.",
                    "Use another optimizer, such as adamw, or train the whole parameter with freeze.train.",
                )

    def _checksum(self, name: str, parameter: Parameter) -> Tensor:
        """Of the bits of all rows that are not trained; two sums, of which one depends on the place."""
        import torch

        whole = parameter.detach().contiguous()
        bits_RH = whole.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()]).long()
        stays_R = torch.ones(len(bits_RH), dtype=torch.long, device=bits_RH.device)
        stays_R[torch.tensor(self._rows[name], device=bits_RH.device)] = 0
        columns_H = torch.arange(1, bits_RH.shape[1] + 1, device=bits_RH.device)
        sums_R = (bits_RH * columns_H).sum(1) * stays_R
        places_R = torch.arange(1, len(sums_R) + 1, device=bits_RH.device)
        return torch.stack([sums_R.sum(), (sums_R * places_R).sum()])


class _Masked:
    """A gradient with zeros in every row but some."""

    def __init__(self, rows: list[int], count: int) -> None:
        import torch

        self._other_R1 = torch.ones(count, 1, dtype=torch.bool)
        self._other_R1[torch.tensor(rows)] = False

    def __call__(self, gradient_RH: Tensor) -> Tensor:
        self._other_R1 = self._other_R1.to(gradient_RH.device)
        return gradient_RH.masked_fill(self._other_R1, 0.0)


def _require_rows(model: Model, name: str, parameter: Parameter, expression: str) -> None:
    tables = [getattr(model.module, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    if not any(table is not None and parameter is table.weight for table in tables):
        raise UserError(
            f"freeze.rows: {expression!r} matches {name}, which is no table of tokens",
            "Only rows of the input embeddings and of the head belong to tokens.",
            "Correct the expression, or train the whole parameter with freeze.train.",
        )


def _row(ctx: Context, token: int | str, parameter: Parameter) -> int:
    row = token if isinstance(token, int) else _id(ctx, token)
    if row >= parameter.shape[0]:
        raise UserError(
            f"freeze.rows names the token {token!r}, but there are {parameter.shape[0]} rows",
            "A row that is not there cannot be trained.",
            "Correct the token, or enlarge the embeddings first.",
        )
    return row


def _id(ctx: Context, text: str) -> int:
    tokenizer = ctx.processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    ids = tokenizer.encode(text, add_special_tokens=False)
    # A token's text in the vocabulary may be written otherwise: ` the` as `Ġthe`.
    if len(ids) == 1 and tokenizer.decode(ids) == text:
        return int(ids[0])
    # All of a vocabulary fits into no message, and in a large one something is near anything.
    close = did_you_mean(text, vocabulary) if len(vocabulary) < 1000 else ""
    raise UserError(
        f"freeze.rows names '{text}', which is {len(ids)} tokens of this tokenizer, or an unknown one",
        close if close.startswith("Did") else "A row belongs to one token.",
        "Write one token as the tokenizer has it, or its id.",
    )
