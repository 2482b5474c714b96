"""The context: what every hook gets first.

There is no other ambient state: no module singletons, no environment variables. A plugin finds here its own section of
the config, the calls into other hooks, the registered states, the exit stack, and randomness that does not depend on
the number of processes or on which other plugins are active.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

from pegbox.errors import fail
from pegbox.events import Event, Signal
from pegbox.record import P, R, Record, Stateful
from pegbox.section import S
from pegbox.types import Item, Model, ModelRequest, Processor, Role, Runtime

if TYPE_CHECKING:
    from pegbox.config import Config
    from pegbox.kernel import Kernel
    from pegbox.plan import Plan

Phase = Literal["generate", "learn"]
SET_BY = {"runtime": "build_runtime", "processor": "load_processor", "total_steps": "build_batches"}


class Rng(Record):
    """A counter-based random source: the seed of (run seed, name, step), the same on every process.

    Feed `seed` to `torch.Generator().manual_seed` or numpy's Philox; `python()` gives the standard library's generator.
    """

    seed: int

    def python(self) -> random.Random:
        return random.Random(self.seed)


@dataclass
class Context:
    """One run. Made by the core; plugins read it.

    Attributes:
        config: the resolved config.
        plan: who does what.
        folder: the run's output folder.
        purpose: `rows`: rows are made, and no model is loaded.
        states: what checkpoints save and restore, by `<plugin>/<name>`.
        exit: closed in reverse however the run ends.
        phase_observers: called with each phase that begins.
        runtime, processor, total_steps: set once each, when `build_runtime`, `load_processor` and `build_batches` have
            answered; reading one earlier is an error. `total_steps` counts optimizer steps of the whole run; None: open
            end.
    """

    config: Config
    kernel: Kernel
    plan: Plan
    folder: Path
    purpose: Literal["run", "rows"] = "run"
    states: dict[str, Stateful] = field(default_factory=dict)
    exit: ExitStack = field(default_factory=ExitStack)
    runtime: Runtime = field(init=False, repr=False)
    processor: Processor = field(init=False, repr=False)
    total_steps: int | None = field(init=False, repr=False)
    log: ClassVar[logging.Logger] = logging.getLogger("pegbox")
    phase_observers: list[Callable[[Phase], None]] = field(default_factory=list)

    def __getattr__(self, name: str) -> NoReturn:
        raise fail("too-early", name=name, hook=SET_BY[name]) if name in SET_BY else AttributeError(name)

    def section(self, schema: type[S]) -> S:
        """The section of the config that `schema` declares, typed."""
        return self.config.section(schema)

    def call(self, spec: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask the one owner of a hook; its wrappers refine the result. Stateful results are registered."""
        return self.kernel.call(self, spec, *args, **kwargs)

    def each(self, spec: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[tuple[str, R]]:
        """Ask every plugin that implements a collecting hook, in list order: (plugin, answer) pairs."""
        return self.kernel.each(spec, *args, **kwargs)

    def owned(self, spec: Callable[..., object]) -> bool:
        """Whether an active plugin owns this hook."""
        return bool(self.kernel.owners(spec.__name__))

    def notify(self, event: Event) -> Signal:
        """Tell every observer; the combined answer."""
        return self.kernel.notify(self, event)

    def items(self, kind: str) -> dict[str, Item]:
        """The items of a kind that active plugins declared, by name."""
        return self.kernel.items(kind)

    def rng(self, name: str, step: int = 0) -> Rng:
        """Randomness for one purpose and step; enabling a plugin never shifts another one's."""
        digest = hashlib.blake2b(f"{self.config.run.seed}/{name}/{step}".encode(), digest_size=8).digest()
        return Rng(seed=int.from_bytes(digest, "big") >> 1)

    def register_state(self, key: str, state: Stateful) -> None:
        """Have checkpoints save and restore `state` as `key` (`<plugin>/<name>`)."""
        if self.states.setdefault(key, state) is not state:
            raise fail("state-twice", key=key)

    def open_model(self, role: Role, request: ModelRequest) -> Model:
        """Load, patch and place a frozen second model (reference, reward, teacher, feature network)."""
        from pegbox.assembly import prepare_model

        model = prepare_model(self, replace(request, role=role))
        model.module.requires_grad_(False).eval()
        return model

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Tell engines that generation or learning begins, so that they know when to sleep and wake."""
        for observer in self.phase_observers:
            observer(name)
        yield
