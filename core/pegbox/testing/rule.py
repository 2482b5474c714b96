"""What a rule of the kit raises when it does not hold."""

from __future__ import annotations


class RuleBroken(AssertionError):
    """A rule does not hold: what was seen, why it is a rule, and what to change.

    Args:
        what: what is wrong, with the value seen.
        why: what would go wrong in a run.
        next: what the author of the plugin changes.
    """

    def __init__(self, what: str, why: str, next: str) -> None:
        self.what, self.why, self.next = what, why, next
        super().__init__(f"{what}\n{why}\n{next}")


def require(holds: bool, what: str, why: str, next: str) -> None:
    """Raise `RuleBroken` unless the rule holds."""
    if not holds:
        raise RuleBroken(what, why, next)
