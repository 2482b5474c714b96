"""What pluggy does by itself, and what the kernel does instead: one pair of tests for each trap.

The first test of a pair pins pluggy's behaviour, so that a release of pluggy that changes it is noticed here; the
second shows that a run of Pegbox does not depend on it.
"""

from __future__ import annotations

from collections.abc import Generator

import pluggy
import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.discovery import discover
from pegbox.errors import PluginError
from pegbox.hooks import hookimpl
from pegbox.plan import compose

VERSION = tuple(int(part) for part in pluggy.__version__.split(".")[:2])
plain_spec = pluggy.HookspecMarker("plain")
plain_impl = pluggy.HookimplMarker("plain")


class Specs:
    @plain_spec
    def collect(self, value: int) -> object: ...

    @plain_spec(firstresult=True)
    def make(self, value: int) -> object: ...


@pytest.fixture
def manager() -> pluggy.PluginManager:
    made = pluggy.PluginManager("plain")
    made.add_hookspecs(Specs)
    return made


def answering(answer: object, **options: bool) -> object:
    class Answering:
        @plain_impl(**options)
        def make(self, value: int) -> object:
            return answer

        @plain_impl(**options)
        def collect(self, value: int) -> object:
            return answer

    return Answering()


def listing(*plugins: str) -> dict[str, object]:
    return {"model": {"name": "m"}, "plugins": list(plugins)}


# ---- one entry point that fails to import aborts loading for all ----


def install_good_and_bad(site) -> None:
    for name, code in (
        ("a-good", "class Plugin: pass"),
        ("bad", "raise OSError('no gpu')"),
        ("z-good", "class Plugin: pass"),
    ):
        module = f"code_of_{name.replace('-', '_')}"
        site.install(name, plugins={name: f"{module}:Plugin"}, files={f"{module}.py": code})


def test_in_pluggy_one_failing_import_aborts_loading_for_all(site, manager) -> None:
    install_good_and_bad(site)
    with pytest.raises(OSError, match="no gpu"):
        manager.load_setuptools_entrypoints("pegbox")


def test_here_a_failing_import_concerns_only_runs_that_list_it(site) -> None:
    install_good_and_bad(site)
    assert {"a-good", "bad", "z-good"} <= set(discover())
    assert list(compose(listing("a-good", "z-good")).kernel.active) == ["a-good", "z-good"]


# ---- a duplicate entry-point name is skipped silently ----


def install_twins(site) -> None:
    for number in (1, 2):
        code = f"class Plugin: number = {number}"
        site.install(f"twin-{number}", plugins={"twin": f"twin_{number}:Plugin"}, files={f"twin_{number}.py": code})


def test_in_pluggy_the_second_entry_point_of_a_name_is_skipped_silently(site, manager) -> None:
    install_twins(site)
    assert manager.load_setuptools_entrypoints("pegbox", name="twin") == 1


def test_here_two_entry_points_of_a_name_are_an_error(site) -> None:
    install_twins(site)
    with pytest.raises(PluginError, match=r"twin-1 1\.0 and twin-2 1\.0"):
        compose(listing("twin"))


# ---- of two answers to a firstresult hook the later registered wins silently; the last registered is called first ----


def test_in_pluggy_the_later_registered_of_two_owners_wins_silently(manager) -> None:
    manager.register(answering("earlier"))
    manager.register(answering("later"))
    assert manager.hook.make(value=1) == "later"
    assert manager.hook.collect(value=1) == ["later", "earlier"]


class Ours:
    def __init__(self, answer: str) -> None:
        self.answer = answer

    @hookimpl
    def build_runtime(self, ctx: Context) -> str:
        return self.answer

    @hookimpl
    def configure_model(self, ctx: Context) -> str:
        return self.answer


def test_here_two_owners_are_an_error_and_collections_come_in_list_order(composed) -> None:
    plugins = {"earlier": Ours("earlier"), "later": Ours("later")}
    with pytest.raises(PluginError, match="2 plugins own build_runtime"):
        composed(plugins)
    ctx = composed(plugins, use={"build_runtime": "earlier"})
    assert ctx.call(hooks.build_runtime, ctx) == "earlier"
    assert ctx.each(hooks.configure_model, ctx) == [("earlier", "earlier"), ("later", "later")]


# ---- an owner that answers None hands the job to the next one ----


def test_in_pluggy_none_hands_the_job_to_another_plugin(manager) -> None:
    manager.register(answering("fallback"))
    manager.register(answering(None))
    assert manager.hook.make(value=1) == "fallback"


def test_here_the_chosen_owner_alone_is_asked(composed) -> None:
    ctx = composed({"fallback": Ours("fallback"), "chosen": Ours(None)}, use={"build_runtime": "chosen"})
    with pytest.raises(PluginError, match=r"'chosen'.*answered None"):
        ctx.call(hooks.build_runtime, ctx)


# ---- a default in an implementation's signature behaves differently in 1.6 and 1.7 ----


def test_in_pluggy_a_default_argument_is_filled_or_not_depending_on_the_version(manager) -> None:
    class Defaulted:
        @plain_impl
        def make(self, value: int = -1) -> int:
            return value

    manager.register(Defaulted())
    assert manager.hook.make(value=1) == (1 if VERSION >= (1, 7) else -1)


def test_here_a_default_argument_is_refused(composed) -> None:
    class Defaulted:
        @hookimpl
        def build_runtime(self, ctx: Context | None = None) -> object:
            return ctx

    with pytest.raises(PluginError, match="argument 'ctx' has a default"):
        composed({"defaulted": Defaulted()})


# ---- specname escapes subset_hook_caller (1.6 looks for an attribute with the name of the hook) ----


def test_in_pluggy_an_implementation_under_another_name_escapes_the_subset_or_not_depending_on_the_version(
    manager,
) -> None:
    class Renamed:
        @plain_impl(specname="make")
        def my_own_make(self, value: int) -> str:
            return "escaped"

    renamed = Renamed()
    manager.register(answering("wanted"))
    manager.register(renamed)
    answer = manager.subset_hook_caller("make", [renamed])(value=1)
    assert answer == ("wanted" if VERSION >= (1, 7) else "escaped")


def test_here_an_implementation_under_another_name_is_refused(composed) -> None:
    class Renamed:
        @hookimpl(specname="build_runtime")
        def my_own_runtime(self, ctx: Context) -> str:
            return "escaped"

    with pytest.raises(PluginError, match="specname"):
        composed({"renamed": Renamed(), "owner": Ours("wanted")})


# ---- reassigning an argument in a wrapper does nothing ----


def test_in_pluggy_a_wrapper_cannot_change_an_argument_by_assigning_it(manager) -> None:
    class Echo:
        @plain_impl
        def make(self, value: int) -> int:
            return value

    class Reassigns:
        @plain_impl(wrapper=True)
        def make(self, value: int) -> Generator[None, int, int]:
            value = 2  # noqa: F841
            return (yield)

    manager.register(Echo())
    manager.register(Reassigns())
    assert manager.hook.make(value=1) == 1


def test_here_a_wrapper_refines_the_result_and_the_owner_sees_the_arguments_of_the_call(composed) -> None:
    class Echo:
        @hookimpl
        def build_batches(self, dataset: object) -> object:
            return [dataset]

    class Reassigns:
        @hookimpl(wrapper=True)
        def build_batches(self, dataset: object) -> Generator[None, list[object], list[object]]:
            dataset = "another"
            return [*(yield), dataset]

    ctx = composed({"reassigns": Reassigns(), "echo": Echo()})
    assert ctx.call(hooks.build_batches, ctx, None, "rows") == ["rows", "another"]


# ---- the last registered wrapper refines last; order within owners does not follow that of wrappers ----


def wrapping(name: str) -> object:
    class Wrapping:
        @plain_impl(wrapper=True)
        def make(self, value: int) -> Generator[None, str, str]:
            return f"{(yield)} {name}"

    return Wrapping()


def test_in_pluggy_the_last_registered_wrapper_refines_last(manager) -> None:
    for plugin in (answering("made"), wrapping("first"), wrapping("second")):
        manager.register(plugin)
    assert manager.hook.make(value=1) == "made first second"


def test_here_the_first_listed_wrapper_refines_first(composed) -> None:
    class Wrapping:
        def __init__(self, name: str) -> None:
            self.name = name

        @hookimpl(wrapper=True)
        def build_runtime(self) -> Generator[None, str, str]:
            return f"{(yield)} {self.name}"

    ctx = composed({"first": Wrapping("first"), "owner": Ours("made"), "second": Wrapping("second")})
    assert ctx.call(hooks.build_runtime, ctx) == "made first second"


# ---- exceptions do not say which plugin raised them ----


class Fails:
    @plain_impl
    def make(self, value: int) -> object:
        raise LookupError("no such thing")

    @hookimpl
    def build_runtime(self) -> object:
        raise LookupError("no such thing")


def test_in_pluggy_an_exception_carries_no_note_of_its_plugin(manager) -> None:
    manager.register(Fails())
    with pytest.raises(LookupError) as error:
        manager.hook.make(value=1)
    assert not hasattr(error.value, "__notes__")


def test_here_an_exception_carries_the_plugin_and_the_hook(composed) -> None:
    ctx = composed({"fails": Fails()})
    with pytest.raises(LookupError) as error:
        ctx.call(hooks.build_runtime, ctx)
    assert error.value.__notes__ == ["in plugin 'fails' (object fails), hook build_runtime"]


# ---- a plugin that equals another one cannot be registered ----


def test_in_pluggy_a_plugin_that_equals_a_registered_one_is_refused(manager) -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        __hash__ = object.__hash__

    manager.register(Equal(), "one")
    with pytest.raises(ValueError, match="already registered"):
        manager.register(Equal(), "two")


def test_here_plugins_without_a_hook_or_with_equal_instances_live_side_by_side(composed) -> None:
    class Equal:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = object.__hash__

    assert list(composed({"one": Equal(), "two": Equal(), "three": object()}).kernel.active) == ["one", "two", "three"]
