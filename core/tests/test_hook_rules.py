"""The rules of hook implementations: what would act differently than it reads is refused when composing."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import PluginError
from pegbox.hooks import SPECS, hookimpl, semantics


class DefaultArgument:
    @hookimpl
    def build_loss(self, ctx: Context, model: object = None) -> object: ...


class StarredArgument:
    @hookimpl
    def build_loss(self, ctx: Context, *model: object) -> object: ...


class StarredKeywords:
    @hookimpl
    def build_loss(self, ctx: Context, **model: object) -> object: ...


class KeywordOnly:
    @hookimpl
    def build_loss(self, ctx: Context, *, model: object) -> object: ...


class UnknownArgument:
    @hookimpl
    def build_loss(self, ctx: Context, modle: object) -> object: ...


class ArgumentOfNone:
    @hookimpl
    def register_items(self, ctx: Context) -> object: ...


class UnknownHook:
    @hookimpl
    def build_los(self, ctx: Context) -> object: ...


class TryFirst:
    @hookimpl(tryfirst=True)
    def build_loss(self, ctx: Context) -> object: ...


class TryLast:
    @hookimpl(trylast=True)
    def build_loss(self, ctx: Context) -> object: ...


class SpecName:
    @hookimpl(specname="build_loss")
    def loss_of_mine(self, ctx: Context) -> object: ...


class SpecNameOfAnother:
    @hookimpl(specname="build_runtime")
    def build_loss(self, ctx: Context) -> object: ...


class OldWrapper:
    @hookimpl(hookwrapper=True)
    def build_loss(self, ctx: Context) -> Generator[None, object, None]:
        yield


class Optional:
    @hookimpl(optionalhook=True)
    def build_loss(self, ctx: Context) -> object: ...


class WrapsACollection:
    @hookimpl(wrapper=True)
    def patch_modules(self, ctx: Context) -> Generator[None, object, object]:
        return (yield)


class WrapsAnObserver:
    @hookimpl(wrapper=True)
    def on_event(self, ctx: Context) -> Generator[None, object, object]:
        return (yield)


class WrapperThatReturns:
    @hookimpl(wrapper=True)
    def build_loss(self, ctx: Context) -> object:
        return "refined"


BROKEN = [
    (DefaultArgument, "build_loss", ["'model'", "default"]),
    (StarredArgument, "build_loss", ["'model'", "starred"]),
    (StarredKeywords, "build_loss", ["'model'", "starred"]),
    (KeywordOnly, "build_loss", ["'model'"]),
    (UnknownArgument, "build_loss", ["unknown argument 'modle'", "ctx, model"]),
    (ArgumentOfNone, "register_items", ["unknown argument 'ctx'", "nothing"]),
    (UnknownHook, "build_los", ["no such hook", "Did you mean 'build_loss'"]),
    (TryFirst, "build_loss", ["tryfirst", "wrapper=True"]),
    (TryLast, "build_loss", ["trylast"]),
    (SpecName, "loss_of_mine", ["specname"]),
    (SpecNameOfAnother, "build_loss", ["specname"]),
    (OldWrapper, "build_loss", ["hookwrapper", "wrapper=True"]),
    (Optional, "build_loss", ["optionalhook"]),
    (WrapsACollection, "patch_modules", ["cannot be wrapped"]),
    (WrapsAnObserver, "on_event", ["cannot be wrapped"]),
    (WrapperThatReturns, "build_loss", ["must be a generator"]),
]


@pytest.mark.parametrize(("plugin", "hook", "parts"), BROKEN, ids=[entry[0].__name__ for entry in BROKEN])
def test_an_implementation_that_breaks_a_rule_is_refused_by_name(composed, plugin, hook, parts) -> None:
    with pytest.raises(PluginError) as error:
        composed({"mine": plugin()})
    for part in ("'mine' (object mine)", hook, *parts):
        assert part in str(error.value)


def test_every_hook_has_a_verb_that_tells_its_semantics_and_only_owned_hooks_stop_at_the_first_answer() -> None:
    assert {semantics(name) for name in SPECS} == {"register", "configure", "own", "patch", "fan_out", "observe"}
    for name, spec in SPECS.items():
        assert spec.pegbox_spec["firstresult"] is (semantics(name) == "own")


def test_specifications_are_declarations_with_documentation_and_without_defaults() -> None:
    import inspect

    for name, spec in SPECS.items():
        assert inspect.getdoc(spec), name
        assert spec.__module__ == hooks.__name__
        assert all(p.default is p.empty for p in inspect.signature(spec).parameters.values())


def test_attributes_that_are_no_hooks_are_left_alone(composed) -> None:
    class Plain:
        threshold = 0.5

        @property
        def costly(self) -> int:
            return 3

        def measure(self, anything: int = 1) -> int:
            return anything

    assert composed({"plain": Plain()}).kernel.implementations() == []
