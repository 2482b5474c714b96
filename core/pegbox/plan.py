"""The plan: who does what in this run, in which order and why, and where every value of the config came from.

`compose` makes it from a config without importing anything heavy: read, activate the listed plugins, validate, find
owners. The plan is what a person reads before a run starts, what all ranks compare, and what the run's folder keeps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any

from pegbox import __version__, hooks
from pegbox.config import CORE_KEYS, Config, RunSection, read_sections, validate
from pegbox.context import Context
from pegbox.errors import fail
from pegbox.hooks import SPECS
from pegbox.kernel import OWNED, Kernel, job_name
from pegbox.record import Record, Stateful
from pegbox.section import Section
from pegbox.source import read
from pegbox.types import Runtime
from pegbox.weighing import OWNER, WeighedLosses

NEEDED = tuple(hook for hook in OWNED if hook not in ("apply_adapters", "generate_rollouts"))
"""Hooks that a training run cannot do without."""


class Job(Record):
    """One hook of the plan: who answers it and why."""

    hook: str
    plugins: tuple[str, ...]
    wrappers: tuple[str, ...]
    reason: str


class Plan(Record):
    """The composed run."""

    plugins: tuple[tuple[str, str], ...]
    jobs: tuple[Job, ...]
    values: tuple[tuple[str, Any, str], ...]
    patches: list[dict[str, Any]] = field(default_factory=list)
    model: dict[str, object] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, stable under reordering of dictionaries."""
        return {
            "pegbox": __version__,
            "plugins": [{"name": name, "from": origin} for name, origin in self.plugins],
            "hooks": [asdict(job) for job in self.jobs],
            "config": [{"key": key, "value": value, "from": origin} for key, value, origin in self.values],
            **({"model": self.model, "patches": self.patches} if self.model else {}),
        }

    def digest(self) -> str:
        """Identifies what the run does: plugins with versions, owners, and every value of the config."""
        content = {**self.to_json(), "config": {key: value for key, value, _ in self.values}}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()

    def agree(self, runtime: Runtime) -> None:
        """Raise unless all ranks hold this plan."""
        digests = runtime.gather_objects(self.digest())
        if other := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
            raise fail("ranks-disagree", ranks=other)


def compose(
    source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), *, instances: dict[str, object] | None = None
) -> Context:
    """Make a run from a config: read, activate, validate, find owners. Imports no plugin that is not listed.

    Args:
        source: a YAML file, `recipe://name`, or a mapping.
        overrides: `key=value`, as on the command line.
        instances: ready plugins by name, used instead of installed ones (for tests and embedding programs).
    """
    layer, folder = read(source, overrides)
    run = validate(RunSection, {key: layer.data[key] for key in CORE_KEYS if key in layer.data}, layer, ())
    folder = Path(run.paths_from or folder).expanduser().absolute()
    weighed = {OWNER: WeighedLosses(run.loss)} if run.loss else {}
    kernel = Kernel.activate((*run.plugins, *weighed), folder, {**(instances or {}), **weighed})
    for name in kernel.active.keys() & {*CORE_KEYS, "extends"}:
        raise fail("plugin-name-taken", name=name, both=f"a key of the core and {kernel.active[name].origin}")
    sections = read_sections(layer, kernel.schemas(), list(kernel.active), kernel.installed)
    kernel.choose_owners({**run.use, **dict.fromkeys(["build_loss"] if weighed else [], OWNER)})
    if weighed:
        able = [i.plugin for i in kernel.implementations("build_loss", wrapper=False) if i.plugin != OWNER] or ["none"]
        if run.loss.keys() != set(able):
            raise fail("loss-weights", loss=", ".join(run.loss), able=", ".join(able), origin=layer.origin(("loss",)))
    config = Config(run=run, sections=sections, layer=layer, folder=folder)
    ctx = Context(config, kernel, make_plan(config, kernel), Path(run.output).expanduser().absolute())
    for name, active in kernel.active.items():
        if isinstance(active.instance, Stateful):
            ctx.register_state(f"{name}/plugin", active.instance)
    for section in (section for section in sections.values() if isinstance(section, Section)):
        section.check(ctx)
    return ctx


def require_training(ctx: Context) -> None:
    """Raise unless every hook that a training run needs has an owner, and every key of the core has an effect."""
    for hook in NEEDED:
        if not ctx.kernel.owners(hook):
            raise ctx.kernel.no_owner(hook)
    if ctx.config.run.rewards and not ctx.kernel.implementations("score_rollouts"):
        raise fail("key-idle", key="rewards", origin=ctx.config.layer.origin(("rewards",)))


def make_plan(config: Config, kernel: Kernel) -> Plan:
    """The plan of a composed kernel."""
    plugins = tuple((a.name, f"{a.origin} {a.origin.content}".strip()) for a in kernel.active.values())
    jobs = []
    for hook in SPECS:
        wrappers = tuple(i.plugin for i in kernel.implementations(hook, wrapper=True))
        kind = hooks.semantics(hook)
        plain = tuple(i.plugin for i in kernel.implementations(hook, wrapper=False))
        if kind == "own":
            for form, owner in kernel.owners(hook).items():
                reason = "chosen by use" if {hook, job_name(hook, form)} & config.run.use.keys() else "the only one"
                jobs.append(Job(hook=job_name(hook, form), plugins=(owner,), wrappers=wrappers, reason=reason))
        elif plain:
            jobs.append(Job(hook=hook, plugins=plain, wrappers=(), reason=f"all {kind}, in list order"))
    return Plan(plugins=plugins, jobs=tuple(jobs), values=tuple(config.origins()))


def plan_model(ctx: Context) -> Plan:
    """The plan with the model built on the meta device: its traits, sizes, and every patch that would be applied."""
    from pegbox.assembly import model_request, prepare_model

    try:
        model = prepare_model(ctx, model_request(ctx, meta=True))
        sizes = [(p.numel(), p.numel() * p.requires_grad) for p in model.module.parameters()]
        total, trainable = (sum(column) for column in zip(*sizes, strict=True))
        facts = {"name": model.name, "traits": sorted(model.traits), "parameters": total, "trainable": trainable}
        return replace(ctx.plan, patches=ctx.kernel.patches.summary(), model=facts)
    finally:
        ctx.kernel.patches.undo()
