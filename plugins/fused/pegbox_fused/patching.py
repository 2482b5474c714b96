"""What is replaced in one model, as patch records, and what is left alone, with the reason.

Every module is tried before it is replaced: on the CPU, which is enough to know what it computes and needs none of its
weights, and with the kernels on the run's device where that is another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, TypeVar

from pegbox.errors import ConfigError, RunError
from pegbox.types import ModulePatch
from pegbox_kernels.recognition import mlps, norms, rotary
from pegbox_kernels.recognition.trial import CLOSE, by_rule

from pegbox_fused.config import FEATURES, FusedConfig
from pegbox_fused.mlps import seam_of
from pegbox_fused.norms import FusedRMSNorm

if TYPE_CHECKING:
    import torch
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Module

Rule = TypeVar("Rule", bound=Hashable)
PASS = "in one pass over memory"


def patches(ctx: Context, model: Model) -> list[ModulePatch]:
    """The records for one model.

    Raises:
        ConfigError: a feature that must be found is not there, or nothing is.
    """
    config, device = ctx.section(FusedConfig), getattr(vars(ctx).get("runtime"), "device", None)
    finders = {"norm": _norms, "mlp": _mlps, "experts": _experts, "rope": _rope}
    found: list[ModulePatch] = []
    for feature in FEATURES:
        wanted = getattr(config, feature)
        if not wanted:
            continue
        left: Counter[str] = Counter()
        records = list(finders[feature](model, device, left))
        lines = [f"{count} {what}" for what, count in left.items()]
        if lines:
            ctx.log.warning("fused.%s leaves alone: %s", feature, "; ".join(lines))
        if wanted is True and not records:
            raise ConfigError(
                f"fused.{feature} is true, but nothing of it is found in {model.name}",
                f"Left alone: {'; '.join(lines)}." if lines else "No module looks like it.",
                f"Set fused.{feature} to auto or false.",
            )
        found += records
    if not found:
        raise ConfigError(
            f"fused finds nothing to do in {model.name}",
            "None of its modules computes what the kernels of this plugin compute.",
            "Remove fused from plugins for this model.",
        )
    return found


def _norms(model: Model, device: torch.device | None, left: Counter[str]) -> Iterator[ModulePatch]:
    def agrees(module: Module, rule: norms.NormRule, device: torch.device) -> bool:
        return norms.agrees(module, rule, device, gated=rule.gated, closeness=CLOSE)

    for rule, names in _found(model, norms.is_candidate, norms.rule_of, agrees, device, left):
        yield ModulePatch(
            slot="norm",
            target=_one_of(names),
            replace=lambda module, rule=rule: FusedRMSNorm(module._parameters.get("weight"), rule),
            reason=f"RMSNorm ({rule}) {PASS}",
            source="arXiv:1910.07467",
        )


def _mlps(model: Model, device: torch.device | None, left: Counter[str]) -> Iterator[ModulePatch]:
    for rule, names in _found(model, mlps.is_candidate, mlps.rule_of, mlps.agrees, device, left):
        yield ModulePatch(
            slot="mlp",
            target=_one_of(names),
            replace=lambda module, rule=rule: mlps.GatedMLP(dict(module.named_children()), rule),
            reason=f"gated linear unit ({rule}) {PASS}",
            source="arXiv:2002.05202",
        )


def _experts(model: Model, device: torch.device | None, left: Counter[str]) -> Iterator[ModulePatch]:
    chosen = getattr(getattr(model.module, "config", None), "_experts_implementation", None)

    def rule_of(module: Module) -> mlps.GluRule | None:
        return mlps.gate_rule_of(module) if chosen in mlps.IMPLEMENTATIONS else None

    def is_candidate(module: Module) -> bool:
        return callable(getattr(module, mlps.SEAM, None))

    for rule, names in _found(model, is_candidate, rule_of, mlps.gate_agrees, device, left):
        yield ModulePatch(
            slot="experts",
            target=_one_of(names),
            replace=lambda module, rule=rule: seam_of(module, rule),
            reason=f"gated linear unit of experts ({rule}) {PASS}",
            source="arXiv:2002.05202",
        )


def _rope(model: Model, device: torch.device | None, left: Counter[str]) -> Iterator[ModulePatch]:
    def agrees(module: Module, kind: rotary.RopeKind, device: torch.device) -> bool:
        return rotary.agrees(module, rotary.turning(kind), device)

    for kind, names in _found(model, rotary.is_candidate, rotary.kind_of, agrees, device, left):
        yield ModulePatch(
            slot="rope",
            target=_one_of(names),
            replace=lambda module, kind=kind: rotary.forward_with(module, rotary.turning(kind)),
            reason=f"rotary embeddings of queries and keys ({kind}) {PASS}",
            source="arXiv:2104.09864",
        )


def _found(
    model: Model,
    is_candidate: Callable[[Module], bool],
    rule_of: Callable[[Module], Rule | None],
    agrees: Callable[[Module, Rule, torch.device], bool],
    device: torch.device | None,
    left: Counter[str],
) -> Iterator[tuple[Rule, frozenset[str]]]:
    """The names of modules by what they compute; those of which that is not known are counted in `left`.

    Raises:
        RunError: a kernel gives other numbers on the run's device than the module does there.
    """
    found, others = by_rule(model.module, is_candidate, rule_of)
    left.update(others)
    for rule, names in found.items():
        wrong = [name for name in names if _differs(agrees, model.module.get_submodule(name), rule, device)]
        if wrong:
            raise RunError(
                f"the kernel for {wrong[0]} ({rule}) gives other numbers on {device} than the module does",
                "On the CPU both agree: the kernel is wrong for this device, driver or version of triton.",
                "Switch the feature off in the section fused, and report this with the versions.",
            )
        yield rule, names


def _differs(
    agrees: Callable[[Module, Rule, torch.device], bool], module: Module, rule: Rule, device: torch.device | None
) -> bool:
    return device is not None and device.type != "cpu" and not agrees(module, rule, device)


def _one_of(names: frozenset[str]) -> Callable[[str, Module], bool]:
    return lambda name, _: name in names
