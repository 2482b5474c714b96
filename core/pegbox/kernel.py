"""The kernel: activates the listed plugins, checks them, finds one owner per job, and makes every call.

pluggy registers and calls. What it has not, and what this file adds: the order of the list is the order of calls, for
owners, collectors and wrappers alike; one owner for each exclusive hook, chosen by the config if several could;
conflicts that name both distributions; and a note on every exception that says which plugin and which hook raised it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from pluggy import PluginManager

from pegbox import hooks
from pegbox.discovery import Installed, discover, load
from pegbox.errors import PegboxError, did_you_mean, fail
from pegbox.events import Event, Signal
from pegbox.hooks import SPECS
from pegbox.patches import PatchLog
from pegbox.record import P, R, Stateful
from pegbox.section import Section
from pegbox.types import Item

if TYPE_CHECKING:
    from pegbox.context import Context

OWNED = [name for name in SPECS if hooks.semantics(name) == "own"]
PER_FORMAT = {"load_model": "model_format", "export_model": "export_format"}


@dataclass(frozen=True)
class Implementation:
    """One plugin's implementation of one hook."""

    hook: str
    plugin: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]
    wrapper: bool


@dataclass(frozen=True)
class Active:
    """An active plugin: its key, where it came from, and its one instance."""

    name: str
    origin: Installed
    instance: object
    implementations: tuple[Implementation, ...]

    def __str__(self) -> str:
        return f"'{self.name}' ({self.origin})"


@dataclass
class Kernel:
    """The active plugins, composed."""

    active: dict[str, Active]
    installed: dict[str, list[Installed]]
    patches: PatchLog = field(default_factory=PatchLog)

    @classmethod
    def activate(cls, names: Sequence[str], folder: Path, instances: Mapping[str, object] | None = None) -> Kernel:
        """Import the listed plugins, in order, and check their implementations; nothing else is imported.

        Args:
            names: plugin names, or `./file.py` relative to `folder`.
            folder: the config's folder.
            instances: ready plugins by name, for tests and for programs that embed Pegbox.
        """
        installed, given = discover(), instances or {}
        active: dict[str, Active] = {}
        for name in names:
            ready = (Installed(name, "", f"object {name}"), given[name]) if name in given else None
            origin, instance = ready or load(name, installed, folder)
            if origin.name in active:
                raise fail("plugin-name-taken", name=origin.name, both=f"{active[origin.name].origin} and {origin}")
            active[origin.name] = Active(origin.name, origin, instance, tuple(_implementations(origin, instance)))
        return cls(active, installed)

    def __post_init__(self) -> None:
        self._manager = PluginManager(hooks.PROJECT)
        self._manager.add_hookspecs(hooks)
        self._parts: dict[str, object] = {}
        # pluggy lets the last registered wrapper refine last: in list order, what is listed first acts first. Of owners
        # it is given one at a time, and `each` asks collectors in list order, so their registration needs no order.
        for plugin in self.active.values():
            self._parts[plugin.name] = self._register(plugin, wrapper=False)
            self._register(plugin, wrapper=True)
        self._owners: dict[str, dict[str, str]] = {hook: {} for hook in OWNED}
        self._callers: dict[tuple[str, str], Callable[..., Any]] = {}
        self._observers = self.implementations("on_event")
        self._items = self._collect_items()

    def _register(self, plugin: Active, *, wrapper: bool) -> object:
        """Register the wrappers, or the other implementations, of one plugin, as pluggy wants them: on an object."""
        methods = {i.hook: staticmethod(i.function) for i in plugin.implementations if i.wrapper is wrapper}
        part = type("Part", (), methods)()
        self._manager.register(part, name=f"{plugin.name}/{'wrappers' if wrapper else 'hooks'}")
        return part

    def implementations(self, hook: str | None = None, *, wrapper: bool | None = None) -> list[Implementation]:
        """Implementations in list order, of one hook, of one kind."""
        every = (i for plugin in self.active.values() for i in plugin.implementations)
        return [i for i in every if hook in (None, i.hook) and wrapper in (None, i.wrapper)]

    def choose_owners(self, use: Mapping[str, str]) -> None:
        """Find the one owner of each exclusive hook; `use` settles where several plugins could be it."""
        jobs = set()
        for hook in OWNED:
            candidates = [i.plugin for i in self.implementations(hook, wrapper=False)]
            for form, able in self._by_format(hook, candidates).items():
                job = job_name(hook, form)
                jobs |= {job, hook}
                self._owners[hook][form] = owner = self._one(job, able, use.get(job) or use.get(hook))
                others = [self._parts[name] for name in candidates if name != owner]
                self._callers[hook, form] = self._manager.subset_hook_caller(hook, others)
        for job in use.keys() - jobs:
            raise fail("use-wrong-hook", job=job, plugin=use[job], hint=did_you_mean(job, jobs, "Jobs with an owner:"))

    def _by_format(self, hook: str, candidates: list[str]) -> dict[str, list[str]]:
        if hook not in PER_FORMAT:
            return {"": candidates} if candidates else {}
        formats: dict[str, list[str]] = {}
        for plugin in candidates:
            own = [item.name for name, item in self._items if name == plugin and item.kind == PER_FORMAT[hook]]
            if not own:
                raise fail("no-format", plugin=self.active[plugin], hook=hook, kind=PER_FORMAT[hook])
            for form in own:
                formats.setdefault(form, []).append(plugin)
        return formats

    def _one(self, job: str, able: list[str], wanted: str | None) -> str:
        if wanted is not None and wanted not in able:
            raise fail("use-wrong-plugin", job=job, wanted=wanted, able=", ".join(able))
        if wanted is None and len(able) > 1:
            said = {"both": " and ".join(str(self.active[name]) for name in able), "first": able[0], "count": len(able)}
            raise fail("two-losses" if job == "build_loss" else "two-owners", job=job, **said)
        return wanted or able[0]

    def owners(self, hook: str) -> dict[str, str]:
        """The owner by format; the key is empty for hooks that have one owner in all; no entry, no owner."""
        return self._owners[hook]

    def no_owner(self, hook: str, form: str = "") -> PegboxError:
        """The error for a job that nobody does, naming the installed plugins that could do it."""
        if form and self._owners[hook]:
            return fail("no-format-owner", job=job_name(hook, form), formats=", ".join(self._owners[hook]))
        idle = self.installed.keys() - self.active
        able = sorted(name for name in idle if hook in _hooks_of(self.installed[name][0]))
        return fail("no-owner", hook=hook, able=", ".join(able) or "none")

    def call(self, ctx: Context, spec: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask the one owner; wrappers refine its answer; an answer that has state is registered."""
        hook, arguments = spec.__name__, _named(spec, args, kwargs)
        form = arguments["request"].format if hook in PER_FORMAT else ""
        if (caller := self._callers.get((hook, form))) is None:
            raise self.no_owner(hook, form)
        owner = self.active[self._owners[hook][form]]
        try:
            answer = caller(**arguments)
        except BaseException as error:
            self._blame(error, hook, [i for i in self.implementations(hook) if i.wrapper or i.plugin == owner.name])
            raise
        if answer is None and hook != "build_dataset":
            raise fail("hook-none", plugin=owner, hook=hook)
        split = getattr(arguments.get("dataset"), "split", arguments.get("split", "train"))
        if isinstance(answer, Stateful) and split == "train":
            ctx.register_state(f"{owner.name}/{hook.split('_', 1)[1]}", answer)
        return answer  # type: ignore[no-any-return]

    def ask(self, plugin: str, spec: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Ask one plugin for its own answer, whoever owns the hook; an answer that has state is registered."""
        found = next(i for i in self.implementations(spec.__name__, wrapper=False) if i.plugin == plugin)
        answer, ctx = self._run(found, arguments := _named(spec, args, kwargs)), arguments["ctx"]
        if isinstance(answer, Stateful):
            ctx.register_state(f"{plugin}/{spec.__name__.split('_', 1)[1]}", answer)
        return answer  # type: ignore[no-any-return]

    def each(self, spec: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[tuple[str, R]]:
        """Ask every implementation in list order; answers of None are left out."""
        arguments = _named(spec, args, kwargs)
        every = ((i.plugin, self._run(i, arguments)) for i in self.implementations(spec.__name__))
        answers = [(plugin, answer) for plugin, answer in every if answer is not None]
        if spec.__name__ == "score_rollouts":
            for p in (p for p, a in answers if not (isinstance(a, Sequence) and all(hasattr(s, "name") for s in a))):
                raise fail("no-score", plugin=self.active[p], answer=dict(answers)[p])
            self._unique_names(spec.__name__, [(plugin, score.name) for plugin, scores in answers for score in scores])
        return answers

    def notify(self, ctx: Context, event: Event) -> Signal:
        """Tell every observer; an exception stops the run unless its plugin is best-effort."""
        signal = Signal.NONE
        for observer in self._observers:
            try:
                signal |= self._run(observer, {"ctx": ctx, "event": event}) or Signal.NONE
            except Exception as error:
                if not getattr(self.active[observer.plugin].instance, "best_effort", False):
                    raise
                ctx.log.warning("%s: %r (best effort: the run goes on)", observer.plugin, error)
        return signal

    def _run(self, implementation: Implementation, arguments: dict[str, Any]) -> Any:
        try:
            return implementation.function(*[arguments[name] for name in implementation.arguments])
        except BaseException as error:
            self._blame(error, implementation.hook, [implementation])
            raise

    def _blame(self, error: BaseException, hook: str, asked: Sequence[Implementation]) -> None:
        """Note on the exception which plugin raised it: the innermost frame of an implementation that was asked."""
        plugin_of = {inspect.unwrap(i.function).__code__: i.plugin for i in asked}
        culprit = ["", *(plugin_of[f.f_code] for f, _ in walk_tb(error.__traceback__) if f.f_code in plugin_of)][-1]
        if not any(note.startswith("in plugin") for note in getattr(error, "__notes__", ())):
            error.add_note(f"in plugin {self.active[culprit]}, hook {hook}" if culprit else f"in hook {hook}")

    def _collect_items(self) -> list[tuple[str, Item]]:
        items = [(plugin, item) for plugin, declared in self.each(hooks.register_items) for item in declared]
        for kind in {item.kind for _, item in items} - {*PER_FORMAT.values()}:
            self._unique_names(kind, [(plugin, item.name) for plugin, item in items if item.kind == kind])
        return items

    def _unique_names(self, what: str, named: list[tuple[str, str]]) -> None:
        first: dict[str, str] = {}
        for plugin, name in named:
            if name in first:
                both = f"{self.active[first[name]]} and {self.active[plugin]}"
                raise fail("name-twice", what=what, name=name, both=both)
            first[name] = plugin

    def items(self, kind: str) -> dict[str, Item]:
        """The declared items of one kind, by name."""
        return {item.name: item for _, item in self._items if item.kind == kind}

    def schemas(self) -> dict[str, type[Section]]:
        """The config section of each active plugin that declares one."""
        return {plugin: section.schema for plugin, section in self.each(hooks.register_config)}


def job_name(hook: str, form: str) -> str:
    """`build_loss`, or `load_model[gguf]` for a hook with one owner per format."""
    return f"{hook}[{form}]" if form else hook


def _named(spec: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(spec.__code__.co_varnames, args, strict=False)), **kwargs}


def _implementations(origin: Installed, instance: object) -> Iterator[Implementation]:
    """The hook implementations of a plugin; what would break the rules of hooks is refused here."""
    for hook in dir(instance):
        function: Any = getattr(instance, hook, None)
        options: Any = getattr(function, f"{hooks.PROJECT}_impl", None)
        if function is None or (not isinstance(options, dict) and hook not in SPECS):
            continue
        if broken := _broken_rule(hook, function, options):
            raise fail("hook-rule", name=origin.name, origin=origin, hook=hook, problem=broken)
        arguments = tuple(inspect.signature(function).parameters)
        yield Implementation(hook, origin.name, function, arguments, bool(options.get("wrapper")))


def _broken_rule(hook: str, function: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """What is wrong with an implementation; an empty string if nothing is."""
    if not isinstance(options, dict):
        return "it is named like a hook, but not marked with @hookimpl"
    banned = [key for key in ("tryfirst", "trylast", "specname", "hookwrapper", "optionalhook") if options.get(key)]
    if banned:
        return f"uses {', '.join(banned)}; the order of calls is the order of plugins, only wrapper=True is known"
    if hook not in SPECS:
        return f"there is no such hook. {did_you_mean(hook, SPECS, 'Hooks:')}"
    known = inspect.signature(SPECS[hook]).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty or parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            return f"argument '{name}' has a default or is starred, which versions of pluggy treat differently"
        if name not in known:
            return f"unknown argument '{name}'; the hook passes: {', '.join(known) or 'nothing'}"
    if options.get("wrapper") and hook not in OWNED:
        return "it cannot be wrapped: wrappers refine the result of a hook that has one owner"
    if options.get("wrapper") and not inspect.isgeneratorfunction(inspect.unwrap(function)):
        return "a wrapper must be a generator: it yields once, receives the result, and returns the refined one"
    return ""


def _hooks_of(plugin: Installed) -> set[str]:
    """The hooks an installed plugin implements; imports it, so only an error that names candidates asks."""
    try:
        return {i.hook for i in _implementations(*load(plugin.name, {plugin.name: [plugin]}, Path())) if not i.wrapper}
    except PegboxError:
        return set()
