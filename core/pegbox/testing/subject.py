"""The plugin under test: where it comes from, its config, and contexts composed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import Distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pegbox.discovery import Installed, discover
from pegbox.kernel import Kernel
from pegbox.plan import compose
from pegbox.testing.rule import RuleBroken, require

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.section import Section
    from pegbox.types import Runtime


@dataclass(frozen=True)
class Subject:
    """One installed plugin.

    Attributes:
        plugin: its name, the key of its section.
        config: its section of the config.
        with_plugins: plugins that are listed before it, because it needs them.
        sections: the sections of those, by name.
        group: the entry-point group that holds it; `pegbox.commands` for a distribution that brings only a command.
        instances: ready plugins by name, used instead of installed ones; rules about packages need an installed one.
    """

    plugin: str
    config: Mapping[str, Any] = field(default_factory=dict)
    with_plugins: tuple[str, ...] = ()
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    group: str = "pegbox"
    instances: Mapping[str, object] = field(default_factory=dict)

    @property
    def installed(self) -> Installed:
        """The one entry point of this name."""
        found = discover(self.group).get(self.plugin, [])
        origins = " and ".join(map(str, found)) or "none"
        require(
            len(found) == 1,
            f"{len(found)} installed distributions bring '{self.plugin}' in the group '{self.group}': {origins}",
            "A plugin is found by the entry point of its distribution; two of one name cannot be told apart.",
            "Type: pip install -e .    in the plugin's folder, and uninstall a second one.",
        )
        return found[0]

    @property
    def distribution(self) -> Distribution:
        return Distribution.from_name(self.installed.distribution)

    @property
    def package(self) -> str:
        """The top-level package that holds the plugin."""
        return self.installed.value.partition(":")[0].partition(".")[0]

    @property
    def folder(self) -> Path:
        """Where the package lies."""
        spec = find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise RuleBroken(
                f"'{self.package}', which the entry point '{self.installed.value}' names, is no importable package",
                "A plugin is a package: its files lie beside it in one folder.",
                f"Name the folder {self.package} and list it in the build's packages.",
            )
        return Path(next(iter(spec.submodule_search_locations)))

    def mapping(self, output: Path | str = "runs/conformance") -> dict[str, Any]:
        """A config with this plugin and those it needs."""
        sections = {name: dict(section) for name, section in self.sections.items()}
        if self.config:
            sections[self.plugin] = dict(self.config)
        model = {"name": "tiny", "format": "transformers"}
        return {"model": model, "plugins": [*self.with_plugins, self.plugin], "output": str(output), **sections}

    def activate(self) -> Kernel:
        """A kernel with this plugin alone."""
        return Kernel.activate([self.plugin], Path(), self.instances)

    def schema(self) -> type[Section] | None:
        """The model of its section; None if it declares none."""
        return self.activate().schemas().get(self.plugin)

    def context(self, folder: Path) -> Context:
        """A composed context with a runtime of one rank, a tokenizer of bytes, and ten steps to go."""
        from pegbox.testing.runtime import FakeRuntime
        from pegbox.testing.tiny import tiny_processor

        ctx = compose(self.mapping(folder / "run"), instances=dict(self.instances))
        ctx.runtime = cast("Runtime", FakeRuntime())
        ctx.processor = tiny_processor()
        ctx.total_steps = 10
        return ctx

    def answer(self, ctx: Context, spec: Callable[..., Any], *arguments: object) -> Any:
        """What this plugin answers to a hook of which several may be asked; None if it does not implement it."""
        return dict(ctx.each(spec, *arguments)).get(self.plugin)
