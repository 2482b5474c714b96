"""What the engine asks of a vLLM: `connection.py` is one in another process, `colocated.py` one in this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from pegbox.rollouts import RolloutRequest

    from pegbox_rollout_vllm.asking import Completion

T = TypeVar("T")


class UnknownToken(Exception):
    """A token of ours is not in vLLM's vocabulary."""


class Vllm(Protocol):
    """One vLLM with a base model and adapters on it.

    Attributes:
        title: what messages call it.
        base: the name of its base model.
        longest: tokens of a prompt and its completion together, at most; None: it does not say.
        met: how often it was reached anew; what it held before is gone.
        own: the run started it and ends it, so that nothing need be put back.
    """

    base: str
    longest: int | None
    met: int

    @property
    def title(self) -> str: ...
    @property
    def own(self) -> bool: ...

    def start(self) -> None:
        """Start it; it need not be ready yet."""

    def reach(self) -> None:
        """Wait until it is ready, and learn what it serves."""

    def close(self) -> None:
        """End it, if it is the run's own."""

    def persist(self, work: Callable[[], T], restore: Callable[[], None]) -> T:
        """Do `work`; if it dies meanwhile and can be started again, `restore` what it held and do the rest."""

    def sleep(self) -> None:
        """Let it give its memory back."""

    def wake(self) -> bool:
        """Wake it; True if it has lost its weights, so that they must be put again."""

    def complete(
        self, name: str, request: RolloutRequest, stop_ids: Sequence[int], made: dict[int, list[Completion]]
    ) -> None:
        """Completions by the model `name` for those prompts that `made` lacks, put into it as they come."""

    def score(self, name: str, tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token after the first. Raises UnknownToken."""

    def require_processed(self, tokens: Sequence[int]) -> None:
        """Raise unless its log-probabilities are those of what it samples from."""

    def adapters(self) -> dict[str, str]:
        """Names of the adapters that it lists, and where each was read."""

    def load_adapter(self, name: str, folder: Path) -> None: ...
    def unload_adapter(self, name: str) -> None: ...

    def settle(self, label: str) -> None:
        """New full weights are there: forget what older ones computed, and carry their label."""

    def label(self) -> str | None:
        """The label of its full weights; None: it keeps none."""

    def checksums(self) -> dict[str, str] | None:
        """SHA-256 of the parameters that its workers hold, by their names; None: it gives none."""

    def read_base(self) -> None:
        """Full weights: read those of the base model again."""
