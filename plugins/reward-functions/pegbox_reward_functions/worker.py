"""A process that calls reward functions: `python -m pegbox_reward_functions.worker SOCKET PARENT`.

It gets what the rewards are, opens them, says that it is ready, and then answers one call after the other until the
other side closes. What functions print goes to standard error.
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
import math
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pegbox.errors import PegboxError, RunError

if TYPE_CHECKING:
    from pegbox_reward_functions.opening import Named, RewardFunction
    from pegbox_reward_functions.pool import Given

SHOWN = 300
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve calls until the connection closes."""
    _die_with(int(sys.argv[2]))
    os.dup2(2, 1)
    connection = Connection(int(sys.argv[1]))
    with suppress(EOFError, ConnectionError):
        rewards: list[Named] = connection.recv()
        try:
            functions = [reward.open() for reward in rewards]
        except PegboxError as error:
            connection.send(("failed", error))
            return
        connection.send(("ready", None))
        while True:
            number, given, takes = connection.recv()
            try:
                connection.send(("values", called(rewards[number].name, functions[number], given, takes)))
            except RunError as error:
                connection.send(("failed", error))


def _die_with(parent: int) -> None:
    """Have Linux kill this process when its parent ends, however it ends; elsewhere the closed connection ends it."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the process that wanted rewards has ended")


def called(name: str, function: RewardFunction, given: Given, takes: Sequence[str]) -> list[float | None]:
    """What a function says of the completions of one prompt.

    Raises:
        RunError: it raised, or what it returned is no list of numbers; the message names prompt and completion.
    """
    try:
        returned = _call(function, {name: given[name] for name in takes})
    except Exception as error:
        trace = "".join(traceback.format_exception(error.with_traceback(_inside(error.__traceback__)))[-12:]).strip()
        raise RunError(
            f"the reward '{name}' raised {type(error).__name__}: {error}\n{_which(function, given, takes)}",
            f"The trace of the function:\n{trace}",
            "Repair the function; return None for a completion to which it does not apply.",
        ) from None
    return checked(name, returned, given)


def _inside(trace: TracebackType | None) -> TracebackType | None:
    """The trace from the function on, without what called it here."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace


def _call(function: RewardFunction, arguments: Given) -> Any:
    returned = function(**arguments)
    return asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned


async def _awaited(returned: Any) -> Any:
    return await returned


def checked(name: str, returned: Any, given: Given) -> list[float | None]:
    """Rewards as plain numbers."""
    wanted = len(given["completions"])
    rule = "A reward is one finite number, or None, for each completion, in their order."
    if isinstance(returned, str | bytes) or (not isinstance(returned, Sequence) and not hasattr(returned, "tolist")):
        raise RunError(
            f"the reward '{name}' returned {returned!r:.100}, which is no list", rule, "Return a list of numbers."
        )
    values = list(returned)
    if len(values) != wanted:
        raise RunError(
            f"the reward '{name}' returned {len(values)} values for {wanted} completions of "
            f"{_shown(given, 'prompts', 0)}",
            rule,
            "Return one value for each of `completions`.",
        )
    return [_number(name, value, given, row) for row, value in enumerate(values)]


def _number(name: str, value: Any, given: Given, row: int) -> float | None:
    if value is None:
        return None
    try:
        number = float(value) if not isinstance(value, str | bytes) else math.nan
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RunError(
            f"the reward '{name}' is {value!r:.100} for {_both(given, row)}",
            "Rewards are added up with weights: one that is no finite number spoils the whole group.",
            "Return a number, or None for a completion to which it does not apply.",
        )
    return number


def _which(function: RewardFunction, given: Given, takes: Sequence[str]) -> str:
    """The first completion for which the function also fails alone; it is called again to find out."""
    count = len(given["completions"])
    for row in range(count):
        try:
            _call(function, {name: given[name][row : row + 1] for name in takes})
        except Exception:
            return f"for {_both(given, row)}"
    return f"for the {count} completions of {_shown(given, 'prompts', 0)} together, for none of them alone"


def _both(given: Given, row: int) -> str:
    return f"{_shown(given, 'completions', row)} of {_shown(given, 'prompts', row)}"


def _shown(given: Given, name: str, row: int) -> str:
    return f"the {name[:-1]} {given[name][row]!r:.{SHOWN}}"


if __name__ == "__main__":
    main()
