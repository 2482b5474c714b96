"""Columns that functions require, against those that the rows have."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError
from pegbox.rows import ExampleStream

from pegbox_reward_functions.opening import GIVEN

if TYPE_CHECKING:
    from pegbox.rows import Dataset

    from pegbox_reward_functions.scoring import OpenedReward

LOOKED_AT = 64
"""Rows whose columns are looked at: sources of a mixture may have different ones."""
TRL_ONLY = ("trainer_state", "log_extra", "log_metric", "environments")


def require_columns(rewards: Sequence[OpenedReward], rows: Dataset) -> None:
    """Raise ConfigError if no row has a column that some function requires. Streams are looked at when they flow."""
    if isinstance(rows, ExampleStream) or not len(rows):
        return
    step = max(1, len(rows) // LOOKED_AT)
    present = {name for at in range(0, len(rows), step) for name in rows[at].columns}
    require_present(rewards, present)


def require_present(rewards: Sequence[OpenedReward], present: Iterable[str]) -> None:
    """Raise ConfigError if a function requires a column that is not there."""
    here = set(present)
    for reward in rewards:
        absent = sorted(reward.parameters.required - here - set(GIVEN))
        if not absent:
            continue
        why = f"Rows carry the columns: {', '.join(sorted(here)) or 'none'}."
        remedy = f"Keep it: data.columns: [{', '.join(sorted(here | set(absent)))}]; or give the parameter a default."
        if absent[0] in TRL_ONLY:
            why = f"TRL's trainer passes '{absent[0]}' to functions; here there is no such trainer."
            remedy = f"Take the parameter out of the function, or give it a default: {absent[0]}=None"
        raise ConfigError(
            f"the reward '{reward.named.name}' requires '{absent[0]}', which the rows do not have", why, remedy
        )
