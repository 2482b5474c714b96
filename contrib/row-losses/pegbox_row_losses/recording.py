"""A loss that is the wrapped one, and writes down what it saw of each row.

It takes what the forward gave to the wrapped loss and adds nothing to the graph: values and gradients are the same
to the bit. Forwards without gradient (evaluation) are not recorded, because they see other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pegbox.errors import PluginError
from pegbox.record import Stateful
from pegbox.rows import Batch
from pegbox.types import LossOutput, Outputs

if TYPE_CHECKING:
    from pegbox.types import Loss

    from pegbox_row_losses.ledger import Ledger


class RecordingLoss:
    """The wrapped loss (`pegbox.types.Loss`), with a ledger."""

    def __init__(self, loss: Loss, ledger: Ledger) -> None:
        self.needs, self.scope = loss.needs, loss.scope
        self._loss, self._ledger = loss, ledger

    def counts(self, batch: Batch) -> Mapping[str, float]:
        return self._loss.counts(batch)

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        logps_N = outputs.logps_N
        assert logps_N is not None, "the loop provides every need"
        if logps_N.requires_grad:
            self._ledger.add(batch, logps_N.detach())
        return self._loss(batch, outputs)


class StatefulRecordingLoss(RecordingLoss):
    """The same around a loss that has state, which stays the state of the wrapped one."""

    _loss: Any

    @property
    def state_scope(self) -> str:
        return getattr(self._loss, "state_scope", "global")

    def state_dict(self) -> dict[str, object]:
        return self._loss.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._loss.load_state_dict(state_dict)


def record(loss: Loss, ledger: Ledger) -> RecordingLoss:
    """The loss, recording into a ledger.

    Raises:
        PluginError: it does not need log-probabilities, so there is nothing to record.
    """
    if "logps" not in loss.needs:
        raise PluginError(
            f"row-losses cannot record {type(loss).__name__}: it needs {', '.join(sorted(loss.needs))}, not logps",
            "The loss of a row is summed from the log-probabilities of its trained tokens.",
            "Remove row-losses from plugins, or train with a loss that needs logps, such as sft.",
        )
    return StatefulRecordingLoss(loss, ledger) if isinstance(loss, Stateful) else RecordingLoss(loss, ledger)
