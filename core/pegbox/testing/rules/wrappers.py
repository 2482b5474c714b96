"""What a wrapper promises: it yields once, returns a refined result, and lets errors pass."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject

Wrapper = Callable[[], Generator[None, Any, Any]]
"""Makes the wrapper's generator, its arguments bound."""
PASSES_NONE = ("build_dataset",)


class OwnerFailed(Exception):
    """What the owner raises in the rule about errors."""


def wrappers_of(subject: Subject, arguments: Mapping[str, Any]) -> dict[str, Wrapper]:
    """The wrappers of a plugin by hook, bound to those of `arguments` that each takes."""

    def bound(function: Callable[..., Any], names: tuple[str, ...]) -> Wrapper:
        return lambda: function(*[arguments[name] for name in names])

    found = subject.activate().implementations(wrapper=True)
    require(
        bool(found),
        f"plugin '{subject.plugin}' has no wrapper",
        "The rules about wrappers look at methods marked @hookimpl(wrapper=True).",
        "Mark the method, or leave WrapperConformance out.",
    )
    return {i.hook: bound(i.function, i.arguments) for i in found}


def yields_once(hook: str, wrapper: Wrapper, result: object) -> object:
    """The wrapper yields nothing, once, and returns something; what it returned."""
    generator, yielded = _started(wrapper)
    require(
        generator is not None,
        f"the wrapper of {hook} returns without a yield",
        "The owner would never be asked.",
        "Write: result = yield",
    )
    require(
        yielded is None,
        f"the wrapper of {hook} yields {yielded!r}",
        "What is yielded goes nowhere: a wrapper never changes the arguments of the owner.",
        "Write: result = yield",
    )
    assert generator is not None, "required above"
    try:
        generator.send(result)
    except StopIteration as stop:
        require(
            stop.value is not None,
            f"the wrapper of {hook} returns None",
            "What a wrapper returns takes the place of what the owner made.",
            "Write: result = yield ... return refined",
        )
        return stop.value
    raise RuleBroken(
        f"the wrapper of {hook} yields a second time",
        "The owner is asked once.",
        "Write exactly one yield on every way through the method.",
    )


def _started(wrapper: Wrapper) -> tuple[Generator[None, Any, Any] | None, object]:
    """The generator at its first yield, and what it yielded; no generator if it returned without one."""
    generator = wrapper()
    try:
        return generator, next(generator)
    except StopIteration:
        return None, None


def passes_none_on(hook: str, wrapper: Wrapper) -> None:
    """Where an owner may answer None, None is passed on."""
    generator, _ = _started(wrapper)
    if generator is None or hook not in PASSES_NONE:
        return
    try:
        generator.send(None)
    except StopIteration as stop:
        require(
            stop.value is None,
            f"the wrapper of {hook} makes {stop.value!r} of None",
            "None says that the config names no data for the split.",
            "Write: if result is None: return None",
        )
    except Exception as error:
        raise RuleBroken(
            f"the wrapper of {hook} fails on None: {type(error).__name__}: {error}",
            "None says that the config names no data for the split, as most configs do for eval.",
            "Write: if result is None: return None",
        ) from error


def lets_errors_pass(hook: str, wrapper: Wrapper) -> None:
    """An error of the owner goes through the wrapper."""
    generator, _ = _started(wrapper)
    if generator is None:
        return
    try:
        generator.throw(OwnerFailed("the owner failed"))
    except OwnerFailed:
        return
    except StopIteration:
        pass
    raise RuleBroken(
        f"the wrapper of {hook} swallows an error of the owner",
        "The run would go on with a result that was never made.",
        "Do not catch what the yield raises; use try/finally to clean up.",
    )
