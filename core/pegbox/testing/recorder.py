"""Which hooks were called, with what, in which order, and what came back; pytest's `HookRecorder` is the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Event
    from pegbox.kernel import Kernel


@dataclass(frozen=True)
class HookCall:
    """One call of a hook.

    Attributes:
        plugins: who was asked, in order; of an owned hook the owner, then its wrappers.
        arguments: what it was called with, by name.
        answer: the owner's refined answer; of a hook that all answer, (plugin, answer) pairs; of an event, the signal.
        error: what it raised; then there is no answer.
    """

    hook: str
    plugins: tuple[str, ...]
    arguments: Mapping[str, Any]
    answer: Any = None
    error: BaseException | None = None


class HookRecorder:
    """Records every hook call of one kernel while it is entered; `calls` holds them in the order they ended."""

    def __init__(self, kernel: Kernel) -> None:
        self.calls: list[HookCall] = []
        self._kernel = kernel
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> HookRecorder:
        self._undo = [
            self._kernel._manager.add_hookcall_monitoring(lambda *_: None, self._owned),
            self._shadow("each", self._each),
            self._shadow("notify", self._notify),
        ]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for undo in reversed(self._undo):
            undo()

    def hooks(self) -> list[str]:
        """The names of the hooks that were called, in order."""
        return [call.hook for call in self.calls]

    def of(self, hook: str) -> list[HookCall]:
        """The calls of one hook."""
        return [call for call in self.calls if call.hook == hook]

    def events(self) -> list[Event]:
        """The events of the run, in order."""
        return [call.arguments["event"] for call in self.of("on_event")]

    def _shadow(self, name: str, recording: Callable[..., Any]) -> Callable[[], None]:
        """Put a recording method over one of the kernel's; what is returned takes it away."""
        original = getattr(self._kernel, name)
        setattr(self._kernel, name, lambda *given, **named: recording(original, *given, **named))
        return lambda: delattr(self._kernel, name)

    def _owned(self, outcome: Any, hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        names = [str(i.plugin_name).rpartition("/")[0] for i in reversed(implementations) if not i.wrapper]
        wrappers = [str(i.plugin_name).rpartition("/")[0] for i in implementations if i.wrapper]
        answer = None if outcome.exception else outcome.get_result()
        self.calls.append(HookCall(hook, (*names, *wrappers), dict(arguments), answer, outcome.exception))

    def _each(self, original: Callable[..., Any], spec: Callable[..., Any], /, *given: Any, **named: Any) -> Any:
        arguments = {**dict(zip(spec.__code__.co_varnames, given, strict=False)), **named}
        plugins = tuple(i.plugin for i in self._kernel.implementations(spec.__name__))
        return self._recorded(spec.__name__, plugins, arguments, lambda: original(spec, *given, **named))

    def _notify(self, original: Callable[..., Any], ctx: Context, event: Event) -> Any:
        plugins = tuple(i.plugin for i in self._kernel.implementations("on_event"))
        return self._recorded("on_event", plugins, {"ctx": ctx, "event": event}, lambda: original(ctx, event))

    def _recorded(
        self, hook: str, plugins: tuple[str, ...], arguments: Mapping[str, Any], ask: Callable[[], Any]
    ) -> Any:
        try:
            answer = ask()
        except BaseException as error:
            self.calls.append(HookCall(hook, plugins, arguments, None, error))
            raise
        self.calls.append(HookCall(hook, plugins, arguments, answer))
        return answer
