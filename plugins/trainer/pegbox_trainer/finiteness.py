"""Stopping at the first loss or gradient that is not finite, without waiting for the device at each step.

Each step leaves a flag on the device, and the names of its rows on the host. The flag is read where the loop
waits anyway: when it logs, and before every checkpoint, so that no checkpoint is ever saved after a bad step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError
from pegbox.rows import Batch, BatchSource
from torch import Tensor

if TYPE_CHECKING:
    from pegbox.types import Runtime


@dataclass(frozen=True)
class StepTrace:
    """What is needed to explain a step later: batches without tensors, and figures on the device.

    Attributes:
        finite_M: for each micro-batch of this rank, whether its loss is finite.
        loss, norm: of the whole step.
        nothing: whether no term counted anything.
    """

    step: int
    batches: tuple[Batch, ...]
    finite_M: Tensor
    loss: Tensor
    norm: Tensor
    nothing: Tensor


class FiniteWatch:
    """The first bad step since the last look."""

    def __init__(self, runtime: Runtime, source: BatchSource) -> None:
        self._runtime, self._source = runtime, source
        self._first_bad = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self._traces: list[StepTrace] = []

    def add(self, trace: StepTrace, *, gradients_may_overflow: bool) -> None:
        """Flag a step on the device if it is bad.

        With a gradient scaler an overflow of the gradient is ordinary: the step is skipped and the scale
        lowered.
        """
        good = torch.isfinite(trace.loss) & ~trace.nothing
        if not gradients_may_overflow:
            good &= torch.isfinite(trace.norm)
        self._first_bad = torch.where((self._first_bad == 0) & ~good, trace.step, self._first_bad)
        self._traces.append(trace)

    def check(self) -> None:
        """Read the flag; waits for the device.

        Raises:
            RunError: a step since the last look was bad; all ranks raise, naming the rows.
        """
        bad = int(self._first_bad)
        if bad:
            raise self._explain(next(trace for trace in self._traces if trace.step == bad))
        self._traces.clear()

    def _explain(self, trace: StepTrace) -> RunError:
        suspects = [batch for batch, fine in zip(trace.batches, trace.finite_M.tolist(), strict=True) if not fine]
        rows = self._rows(suspects)
        if rows:
            what = f"the loss of the batch {rows} is not finite"
        elif bool(trace.nothing):
            what = f"no token is trained in {self._rows(trace.batches)}"
        else:
            figures = f"the loss is {float(trace.loss)} and the norm of its gradient {float(trace.norm)}"
            what = f"{figures}, in {self._rows(trace.batches)}"
        return RunError(
            f"step {trace.step}: {what}",
            "Weights after such a step are worthless, so the run stops; no checkpoint was saved after it.",
            "Look at these rows; else lower the learning rate, or set trainer.precision to bf16 or fp32. "
            "Then resume=auto goes on from the last checkpoint.",
        )

    def _rows(self, batches: Sequence[Batch]) -> str:
        """Where the rows of batches came from, over all ranks."""
        own = [self._source.describe(batch) for batch in batches if batch.rows]
        gathered = self._runtime.gather_objects(own)
        return "; ".join(text for texts in gathered for text in texts)  # type: ignore[attr-defined]


def without_tensors(batch: Batch) -> Batch:
    """A batch that still knows its rows, for messages, and holds no memory."""
    nothing = batch.trained_N.new_empty(0)
    return replace(
        batch,
        input_ids_BT=nothing,
        targets_BT=nothing,
        trained_N=nothing,
        attention_mask_BT=None,
        position_ids_BT=None,
        cu_seqlens_S=None,
        extra={},
    )
