"""Composition and calls: order, one owner per job, formats, blame, observers, items."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Sequence

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import PluginError, UserError
from pegbox.events import Event, RunFailed, Signal
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rollouts import RolloutBatch, Score
from pegbox.types import ConfigSection, ExportRequest, Item, ModelOptions, ModelRequest

EVENT = RunFailed(error=ValueError("a run failed"))


class Owner:
    """Owns `build_runtime`; what it answers shows who touched it."""

    @hookimpl
    def build_runtime(self, ctx: Context) -> list[str]:
        return ["owner"]


class Refiner:
    """Wraps `build_runtime` and adds its name to what it receives."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl(wrapper=True)
    def build_runtime(self, ctx: Context) -> Generator[None, list[str], list[str]]:
        answer = yield
        return [*answer, self.name]


class Speaker:
    """Answers every kind of collecting hook with its name, and notes each event."""

    def __init__(self, name: str, heard: list[str] | None = None) -> None:
        self.name, self.heard = name, [] if heard is None else heard

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind="reward", name=f"reward of {self.name}", target=self)]

    @hookimpl
    def configure_model(self, ctx: Context) -> ModelOptions:
        return ModelOptions(dtype=self.name)

    @hookimpl
    def patch_attention(self, ctx: Context, model: object) -> object:
        return [self.name]

    @hookimpl
    def score_rollouts(self, ctx: Context, rollouts: object) -> object:
        return [Score(name=self.name, values_R=(1.0,))]

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        self.heard.append(self.name)


# ---- order ----


@pytest.mark.parametrize("names", list(itertools.permutations(["alpha", "bravo", "charlie"])))
@pytest.mark.parametrize(
    ("spec", "arguments"),
    [(hooks.configure_model, []), (hooks.patch_attention, [None]), (hooks.score_rollouts, [None])],
    ids=["configure", "patch", "fan-out"],
)
def test_collecting_hooks_answer_in_list_order(composed, names, spec, arguments) -> None:
    ctx = composed({name: Speaker(name) for name in names})
    assert [plugin for plugin, _ in ctx.each(spec, ctx, *arguments)] == list(names)


def test_observers_hear_and_items_are_collected_in_list_order(composed) -> None:
    heard: list[str] = []
    names = ["bravo", "alpha", "charlie"]
    ctx = composed({name: Speaker(name, heard) for name in names})
    ctx.notify(EVENT)
    assert heard == names
    assert list(ctx.items("reward")) == [f"reward of {name}" for name in names]
    assert ctx.items("optimizer") == {}


@pytest.mark.parametrize("names", list(itertools.permutations(["first", "owner", "second"])))
def test_the_first_listed_wrapper_refines_first_wherever_the_owner_stands(composed, names) -> None:
    plugins = {name: Owner() if name == "owner" else Refiner(name) for name in names}
    ctx = composed(plugins)
    wrappers = [name for name in names if name != "owner"]
    assert ctx.call(hooks.build_runtime, ctx) == ["owner", *wrappers]


def test_a_wrapper_sees_the_result_of_the_chosen_owner_alone(composed) -> None:
    class Other:
        @hookimpl
        def build_runtime(self, ctx: Context) -> list[str]:
            raise AssertionError("was asked although another plugin is the owner")

    plugins = {"other": Other(), "refiner": Refiner("refiner"), "owner": Owner()}
    ctx = composed(plugins, use={"build_runtime": "owner"})
    assert ctx.call(hooks.build_runtime, ctx) == ["owner", "refiner"]


def test_an_implementation_may_leave_out_arguments_and_take_them_in_any_order(composed) -> None:
    class Short:
        @hookimpl
        def build_batches(self, dataset: object) -> object:
            return ("batches", dataset)

        @hookimpl
        def build_loss(self, model: object, ctx: Context) -> object:
            return ("loss", model, ctx.config.run.seed)

    ctx = composed({"short": Short()}, seed=7)
    assert ctx.call(hooks.build_batches, ctx, "model", "rows") == ("batches", "rows")
    assert ctx.call(hooks.build_loss, ctx, model="model") == ("loss", "model", 7)


def test_answers_of_none_are_left_out_of_a_collection(composed) -> None:
    class Silent:
        @hookimpl
        def configure_model(self, ctx: Context) -> None:
            return None

    ctx = composed({"silent": Silent(), "alpha": Speaker("alpha")})
    assert [plugin for plugin, _ in ctx.each(hooks.configure_model, ctx)] == ["alpha"]


# ---- one owner ----


def test_two_owners_are_refused_when_composing_with_both_distributions_and_the_cure(site) -> None:
    for name, version in (("alpha", "1.1"), ("bravo", "2.2")):
        site.plugin(name, "@hookimpl\ndef build_loss(self, ctx):\n    return 1", version=version)
    config = {"model": {"name": "m"}, "plugins": ["alpha", "bravo"]}
    with pytest.raises(PluginError, match="2 plugins own build_loss") as error:
        compose(config)
    for part in ("'alpha' (dist-alpha 1.1)", "'bravo' (dist-bravo 2.2)", "use:"):
        assert part in str(error.value)
    for owner in ("alpha", "bravo"):
        kernel = compose({**config, "use": {"build_loss": owner}}).kernel
        assert kernel.owners("build_loss") == {"": owner}


def test_a_hook_without_an_owner_has_none_and_calling_it_says_which(composed) -> None:
    ctx = composed({"refiner": Refiner("refiner")})
    assert not ctx.owned(hooks.build_runtime)
    assert ctx.kernel.owners("build_runtime") == {}
    with pytest.raises(PluginError, match="no active plugin owns build_runtime"):
        ctx.call(hooks.build_runtime, ctx)


def test_an_owner_that_answers_none_is_named(composed) -> None:
    class Absent:
        @hookimpl
        def build_runtime(self, ctx: Context) -> None:
            return None

    ctx = composed({"absent": Absent()})
    with pytest.raises(PluginError, match=r"'absent' \(object absent\) owns build_runtime but answered None"):
        ctx.call(hooks.build_runtime, ctx)


def test_a_dataset_may_be_none_and_passes_its_wrappers(composed) -> None:
    class NoData:
        @hookimpl
        def build_dataset(self, ctx: Context, split: str) -> None:
            return None

    class Filter:
        @hookimpl(wrapper=True)
        def build_dataset(self) -> Generator[None, object, object]:
            return (yield)

    ctx = composed({"filter": Filter(), "nodata": NoData()})
    assert ctx.call(hooks.build_dataset, ctx, None, "eval") is None


@pytest.mark.parametrize(
    ("use", "parts"),
    [
        ({"build_runtime": "speaker"}, ["'speaker' does not own build_runtime", "owner"]),
        ({"build_runtim": "owner"}, ["'use' names build_runtim", "Did you mean 'build_runtime'?"]),
        ({"patch_modules": "owner"}, ["'use' names patch_modules", "no active plugin owns"]),
        ({"build_loss": "owner"}, ["'use' names build_loss", "no active plugin owns"]),
    ],
)
def test_a_use_that_cannot_be_followed_says_what_could(composed, use, parts) -> None:
    with pytest.raises(PluginError) as error:
        composed({"owner": Owner(), "speaker": Speaker("speaker")}, use=use)
    for part in parts:
        assert part in str(error.value)


# ---- one owner per format ----


class Loader:
    """Owns `load_model` and `export_model` for the formats it is given."""

    def __init__(self, name: str, *formats: str) -> None:
        self.name, self.formats = name, formats

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        kinds = ("model_format", "export_format")
        return [Item(kind=kind, name=form, target=self) for form in self.formats for kind in kinds]

    @hookimpl
    def load_model(self, ctx: Context, request: ModelRequest) -> str:
        return f"{self.name} loads {request.format}"

    @hookimpl
    def export_model(self, ctx: Context, model: object, request: ExportRequest) -> str:
        return f"{self.name} exports {request.format}"


def load(ctx: Context, form: str) -> object:
    return ctx.call(hooks.load_model, ctx, ModelRequest(name="m", format=form))


def test_loading_and_exporting_have_one_owner_per_format(composed, tmp_path) -> None:
    ctx = composed({"hf": Loader("hf", "transformers", "peft"), "gguf": Loader("gguf", "gguf")})
    assert [load(ctx, form) for form in ("transformers", "gguf")] == ["hf loads transformers", "gguf loads gguf"]
    request = ExportRequest(folder=tmp_path, format="peft")
    assert ctx.call(hooks.export_model, ctx, None, request) == "hf exports peft"
    assert ctx.kernel.owners("load_model") == {"transformers": "hf", "peft": "hf", "gguf": "gguf"}


def test_wrappers_refine_whichever_format_was_asked_for(composed) -> None:
    class Shout:
        @hookimpl(wrapper=True)
        def load_model(self) -> Generator[None, str, str]:
            return (yield).upper()

    ctx = composed({"shout": Shout(), "hf": Loader("hf", "transformers"), "gguf": Loader("gguf", "gguf")})
    assert [load(ctx, form) for form in ("transformers", "gguf")] == ["HF LOADS TRANSFORMERS", "GGUF LOADS GGUF"]


def test_a_format_without_an_owner_names_those_that_have_one(composed) -> None:
    ctx = composed({"hf": Loader("hf", "transformers"), "gguf": Loader("gguf", "gguf")})
    with pytest.raises(PluginError, match=r"no active plugin owns load_model\[awq\]") as error:
        load(ctx, "awq")
    assert "transformers, gguf" in str(error.value)


def test_an_owner_that_declares_no_format_is_refused_when_composing(composed) -> None:
    with pytest.raises(PluginError, match=r"'hf'.*implements load_model but declares no format") as error:
        composed({"hf": Loader("hf")})
    assert "Item(kind='model_format'" in error.value.next


def test_two_owners_of_one_format_are_settled_by_use_for_that_format(composed) -> None:
    plugins = {"one": Loader("one", "x"), "two": Loader("two", "x", "y")}
    with pytest.raises(PluginError, match=r"2 plugins own load_model\[x\]"):
        composed(plugins)
    ctx = composed(plugins, use={"load_model[x]": "two", "export_model[x]": "one"})
    assert [load(ctx, form) for form in "xy"] == ["two loads x", "two loads y"]
    assert ctx.kernel.owners("export_model") == {"x": "one", "y": "two"}


def test_use_of_a_whole_hook_settles_every_format_that_the_plugin_handles(composed) -> None:
    plugins = {"one": Loader("one", "x", "y"), "two": Loader("two", "x", "y")}
    ctx = composed(plugins, use={"load_model": "two", "export_model": "one"})
    assert [load(ctx, form) for form in "xy"] == ["two loads x", "two loads y"]


class OnlyLoads(Loader):
    export_model = None

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [item for item in super().register_items() if item.kind == "model_format"]


@pytest.mark.parametrize("plugin", [Owner, lambda: OnlyLoads("loader", "x")], ids=["plain", "per-format"])
def test_what_the_message_about_two_owners_says_to_add_to_the_config_works(compose_text, plugin) -> None:
    text, plugins = "model: {name: m}\nplugins: [one, two]\n", {"one": plugin(), "two": plugin()}
    with pytest.raises(PluginError, match="2 plugins own") as error:
        compose_text(text, **plugins)
    kernel = compose_text(text + error.value.next.split("or add: ")[1], **plugins).kernel
    assert "one" in {*kernel.owners("build_runtime").values(), *kernel.owners("load_model").values()}


# ---- blame ----


class Boom(Exception):
    pass


class BadOwner:
    @hookimpl
    def build_runtime(self, ctx: Context) -> object:
        raise Boom("owner")


class BadBefore:
    @hookimpl(wrapper=True)
    def build_runtime(self, ctx: Context) -> Generator[None, object, object]:
        raise Boom("before")
        yield


class BadAfter:
    @hookimpl(wrapper=True)
    def build_runtime(self, ctx: Context) -> Generator[None, object, object]:
        yield
        raise Boom("after")


class BadCollector:
    @hookimpl
    def patch_attention(self, ctx: Context) -> object:
        return [int(text) for text in ("1", "x")]


class BadObserver:
    @hookimpl
    def on_event(self, event: Event) -> None:
        raise Boom("observer")


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@pytest.mark.parametrize("bad", [BadOwner, BadBefore, BadAfter])
def test_an_exception_in_an_owner_or_wrapper_names_plugin_and_hook(composed, bad) -> None:
    plugins = {"refiner": Refiner("refiner"), "bad": bad(), "late": Refiner("late")}
    if bad is not BadOwner:
        plugins["owner"] = Owner()
    ctx = composed(plugins)
    with pytest.raises(Boom) as error:
        ctx.call(hooks.build_runtime, ctx)
    assert notes(error.value) == ["in plugin 'bad' (object bad), hook build_runtime"]


def test_an_exception_in_a_collecting_hook_names_plugin_and_hook(composed) -> None:
    ctx = composed({"alpha": Speaker("alpha"), "bad": BadCollector(), "bravo": Speaker("bravo")})
    with pytest.raises(ValueError, match="invalid literal") as error:
        ctx.each(hooks.patch_attention, ctx, None)
    assert notes(error.value) == ["in plugin 'bad' (object bad), hook patch_attention"]


def test_an_interrupt_keeps_its_kind_and_is_noted(composed) -> None:
    class Interrupted:
        @hookimpl
        def build_runtime(self) -> object:
            raise KeyboardInterrupt

    ctx = composed({"slow": Interrupted()})
    with pytest.raises(KeyboardInterrupt) as error:
        ctx.call(hooks.build_runtime, ctx)
    assert notes(error.value) == ["in plugin 'slow' (object slow), hook build_runtime"]


def test_a_call_inside_a_hook_is_blamed_once_on_the_plugin_that_raised(composed) -> None:
    class Caller:
        @hookimpl
        def build_loss(self, ctx: Context) -> object:
            return ctx.call(hooks.build_runtime, ctx)

    ctx = composed({"caller": Caller(), "bad": BadOwner()})
    with pytest.raises(Boom) as error:
        ctx.call(hooks.build_loss, ctx, None)
    assert notes(error.value) == ["in plugin 'bad' (object bad), hook build_runtime"]


def test_plugins_that_share_code_are_told_apart(composed) -> None:
    class Fine(BadCollector, BadObserver, BadOwner):
        """Inherits every method and listed last: its code is the code of the others."""

    plugins = {"bad": Fine(), "fine": Fine()}
    ctx = composed(plugins, use={"build_runtime": "bad"})
    calls = {
        "build_runtime": lambda: ctx.call(hooks.build_runtime, ctx),
        "patch_attention": lambda: ctx.each(hooks.patch_attention, ctx, None),
        "on_event": lambda: ctx.notify(EVENT),
    }
    for hook, call in calls.items():
        with pytest.raises((Boom, ValueError)) as error:
            call()
        assert notes(error.value) == [f"in plugin 'bad' (object bad), hook {hook}"]


def test_a_note_names_the_distribution_of_an_installed_plugin(site) -> None:
    site.plugin("alpha", "@hookimpl\ndef build_runtime(self):\n    return 1 / 0", version="5.1")
    ctx = compose({"model": {"name": "m"}, "plugins": ["alpha"]})
    with pytest.raises(ZeroDivisionError) as error:
        ctx.call(hooks.build_runtime, ctx)
    assert notes(error.value) == ["in plugin 'alpha' (dist-alpha 5.1), hook build_runtime"]


# ---- observers ----


class Voter:
    def __init__(self, answer: Signal | None) -> None:
        self.answer = answer

    @hookimpl
    def on_event(self) -> Signal | None:
        return self.answer


@pytest.mark.parametrize(
    ("answers", "union"),
    [
        ([], Signal.NONE),
        ([None, None], Signal.NONE),
        ([None, Signal.SAVE], Signal.SAVE),
        ([Signal.STOP, None, Signal.EVAL | Signal.SAVE], Signal.STOP | Signal.EVAL | Signal.SAVE),
        ([Signal.SAVE, Signal.SAVE], Signal.SAVE),
    ],
)
def test_the_signals_of_all_observers_are_joined(composed, answers, union) -> None:
    ctx = composed({f"voter{index}": Voter(answer) for index, answer in enumerate(answers)})
    assert ctx.notify(EVENT) is union


def test_an_observer_that_fails_stops_the_run(composed) -> None:
    heard: list[str] = []
    ctx = composed({"bad": BadObserver(), "alpha": Speaker("alpha", heard)})
    with pytest.raises(Boom) as error:
        ctx.notify(EVENT)
    assert notes(error.value) == ["in plugin 'bad' (object bad), hook on_event"]
    assert heard == []


def test_a_best_effort_observer_that_fails_is_logged_and_the_others_still_hear(composed, caplog) -> None:
    class Logger(BadObserver):
        best_effort = True

    heard: list[str] = []
    ctx = composed({"logger": Logger(), "alpha": Speaker("alpha", heard), "voter": Voter(Signal.STOP)})
    with caplog.at_level(logging.WARNING, logger="pegbox"):
        assert ctx.notify(EVENT) is Signal.STOP
    assert heard == ["alpha"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "logger" in caplog.text
    assert "observer" in caplog.text


def test_best_effort_does_not_swallow_an_interrupt(composed) -> None:
    class Stubborn:
        best_effort = True

        @hookimpl
        def on_event(self) -> None:
            raise KeyboardInterrupt

    ctx = composed({"stubborn": Stubborn()})
    with pytest.raises(KeyboardInterrupt):
        ctx.notify(EVENT)


# ---- names ----


ITEMS = """@hookimpl
def register_items(self):
    from pegbox.types import Item
    return [Item(kind="{kind}", name="length", target=self)]"""


def test_two_items_of_one_kind_and_name_are_refused_with_both_distributions(site) -> None:
    for name in ("alpha", "bravo"):
        site.plugin(name, ITEMS.format(kind="reward"), version="1.5")
    with pytest.raises(UserError, match="reward") as error:
        compose({"model": {"name": "m"}, "plugins": ["alpha", "bravo"]})
    for part in ("'length'", "'alpha' (dist-alpha 1.5)", "'bravo' (dist-bravo 1.5)"):
        assert part in str(error.value)


def test_one_name_may_stand_in_two_kinds(site) -> None:
    site.plugin("alpha", ITEMS.format(kind="reward"))
    site.plugin("bravo", ITEMS.format(kind="template"))
    ctx = compose({"model": {"name": "m"}, "plugins": ["alpha", "bravo"]})
    assert list(ctx.items("reward")) == list(ctx.items("template")) == ["length"]


def test_two_scores_of_one_name_are_refused_with_both_plugins(composed) -> None:
    plugins = {"one": Scorer("length"), "two": Scorer("accuracy", "length")}
    ctx = composed(plugins)
    with pytest.raises(PluginError, match="score_rollouts") as error:
        ctx.each(hooks.score_rollouts, ctx, None)
    for part in ("'length'", "'one' (object one)", "'two' (object two)"):
        assert part in str(error.value)


class Scorer:
    def __init__(self, *names: str) -> None:
        self.names = names

    @hookimpl
    def score_rollouts(self) -> object:
        return [Score(name=name, values_R=(0.5,)) for name in self.names]


def test_each_score_keeps_its_plugins_name(composed) -> None:
    ctx = composed({"one": Scorer("a", "b"), "two": Scorer("c")})
    answers = ctx.each(hooks.score_rollouts, ctx, None)
    assert [(plugin, [score.name for score in scores]) for plugin, scores in answers] == [
        ("one", ["a", "b"]),
        ("two", ["c"]),
    ]


def test_sections_are_declared_under_the_plugins_own_key(composed) -> None:
    from pegbox.section import Section, setting

    class Settings(Section):
        level: int = setting(3, "How much.")

    class Configured:
        @hookimpl
        def register_config(self) -> ConfigSection:
            return ConfigSection(schema=Settings)

    ctx = composed({"configured": Configured()}, configured={"level": 5})
    assert ctx.kernel.schemas() == {"configured": Settings}
    assert ctx.section(Settings).level == 5


@pytest.mark.parametrize("answer", [[1.0, 2.0], 0.5, "good"])
def test_a_scorer_that_returns_no_scores_is_named_and_told_what_to_return(composed, answer: object) -> None:
    class Scorer:
        @hookimpl
        def score_rollouts(self):
            return answer

    ctx = composed({"scorer": Scorer()})
    with pytest.raises(PluginError, match=r"'scorer'.*score_rollouts, returned(.|\n)*Return \[Score\(name='scorer'"):
        ctx.each(hooks.score_rollouts, ctx, RolloutBatch(rollouts=(), samples=1))
