"""What the library replaces in one model, as patch records, and what is left alone, with the reason.

What a module computes is found on the CPU, by its numbers, with plain PyTorch; whether the library's kernel computes
the same is tried on the run's device, in the data types of the run, before anything is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from pegbox.errors import ConfigError, RunError
from pegbox.types import ModulePatch
from pegbox_kernels.recognition import mlps, norms, rotary
from pegbox_kernels.recognition.trial import Closeness, by_rule, trial

from pegbox_liger import modules
from pegbox_liger.config import FEATURES, LigerConfig
from pegbox_liger.device import require_kernels_run_on

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, Runtime
    from torch.nn import Module

Rule = TypeVar("Rule", bound=Hashable)
SOURCE = "arXiv:2410.10989"
NEAR = Closeness(same_dtype=False, slack=16.0)
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_tanh"}


def patches(ctx: Context, model: Model) -> list[ModulePatch]:
    """The records for one model.

    Raises:
        ConfigError: the run is on a CPU, a feature that must fit fits nowhere, or nothing does.
        RunError: a kernel gives other numbers than the module whose place it takes.
    """
    config, runtime = ctx.section(LigerConfig), vars(ctx).get("runtime")
    if runtime is not None:
        require_kernels_run_on(runtime.device)
    found: list[ModulePatch] = []
    for feature in FEATURES:
        wanted = getattr(config, feature)
        if not wanted:
            continue
        left: Counter[str] = Counter()
        records = list(_records(feature, model, runtime, left))
        lines = [f"{count} {what}" for what, count in left.items()]
        if lines:
            ctx.log.warning("liger.%s leaves alone: %s", feature, "; ".join(lines))
        if wanted is True and not records:
            raise ConfigError(
                f"liger.{feature} is true, but nothing of it is found in {model.name}",
                f"Left alone: {'; '.join(lines)}." if lines else "No module looks like it.",
                f"Set liger.{feature} to auto or false.",
            )
        found += records
    if not found:
        raise ConfigError(
            f"liger finds nothing to do in {model.name}",
            "None of its modules computes what the features that are on compute.",
            "Remove liger from plugins for this model.",
        )
    return found


def _records(feature: str, model: Model, runtime: Runtime | None, left: Counter[str]) -> Iterator[ModulePatch]:
    if feature == "rms_norm":
        return _rms_norms(model, runtime, left)
    if feature == "layer_norm":
        return _layer_norms(model, runtime, left)
    if feature == "rope":
        return _ropes(model, runtime, left)
    return _mlps(ACTIVATIONS[feature], model, runtime, left)


def _rms_norms(model: Model, runtime: Runtime | None, left: Counter[str]) -> Iterator[ModulePatch]:
    def is_candidate(module: Module) -> bool:
        return norms.is_candidate(module) and module._parameters.get("weight") is not None

    def rule_of(module: Module) -> norms.NormRule | None:
        rule = norms.rule_of(module)
        return None if rule is None or rule.gated else rule

    def agrees(module: Module, rule: norms.NormRule, device: torch.device) -> bool:
        def compute(x: torch.Tensor, weight: torch.nn.Parameter) -> torch.Tensor:
            normalized: torch.Tensor = modules.rms_norm(weight, rule)(x)
            return normalized

        modes = _modes(module.weight.dtype, runtime)
        return norms.agrees(module, compute, device, modes=modes, closeness=NEAR)

    for rule, names in _found(model, is_candidate, rule_of, agrees, runtime, left):
        yield ModulePatch(
            slot="norm",
            target=_one_of(names),
            replace=lambda module, rule=rule: modules.rms_norm(module.weight, rule),
            reason=f"RMSNorm of liger-kernel ({rule})",
            source=SOURCE,
        )


def _layer_norms(model: Model, runtime: Runtime | None, left: Counter[str]) -> Iterator[ModulePatch]:
    def is_candidate(module: Module) -> bool:
        return type(module) is torch.nn.LayerNorm

    def rule_of(module: Module) -> Literal["weight and bias"] | None:
        own = dict(module.named_parameters(recurse=False))
        fits = own.keys() == {"weight", "bias"} and own["weight"].ndim == 1
        return "weight and bias" if fits else None

    def agrees(module: Module, rule: str, device: torch.device) -> bool:
        hidden, dtype = module.weight.shape[0], module.weight.dtype
        made = {
            name: torch.nn.Parameter(torch.linspace(0.5, 2, hidden).to(device, dtype)) for name in ("weight", "bias")
        }
        copy = trial(module, made, {})
        x = torch.linspace(-3, 5, 4 * hidden).sin().view(4, hidden).to(device, dtype)
        with torch.no_grad():
            ours, theirs = modules.LigerLayerNorm(copy)(x), copy.forward(x)
        return bool(torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2))

    for rule, names in _found(model, is_candidate, rule_of, agrees, runtime, left):
        yield ModulePatch(
            slot="norm",
            target=_one_of(names),
            replace=modules.LigerLayerNorm,
            reason=f"LayerNorm of liger-kernel ({rule})",
            source=SOURCE,
        )


def _mlps(activation: str, model: Model, runtime: Runtime | None, left: Counter[str]) -> Iterator[ModulePatch]:
    others = {"silu": {"gelu", "gelu_tanh"}, "gelu_tanh": {"silu"}}[activation]

    def is_candidate(module: Module) -> bool:
        """An MLP of the other feature is none."""
        return mlps.is_candidate(module) and getattr(mlps.rule_of(module), "activation", None) not in others

    def rule_of(module: Module) -> mlps.GluRule | None:
        rule = mlps.rule_of(module)
        return rule if rule is not None and rule.activation == activation else None

    def agrees(module: Module, rule: mlps.GluRule, device: torch.device) -> bool:
        return mlps.agrees(module, modules.LigerProduct(rule.activation), device)

    for rule, names in _found(model, is_candidate, rule_of, agrees, runtime, left):
        yield ModulePatch(
            slot="mlp",
            target=_one_of(names),
            replace=lambda module, rule=rule: mlps.GatedMLP(
                dict(module.named_children()), modules.LigerProduct(rule.activation)
            ),
            reason=f"gated linear unit of liger-kernel ({rule})",
            source=SOURCE,
        )


def _ropes(model: Model, runtime: Runtime | None, left: Counter[str]) -> Iterator[ModulePatch]:
    def rule_of(module: Module) -> rotary.RopeKind | None:
        kind = rotary.kind_of(module)
        return kind if kind in modules.TURNS else None

    def agrees(module: Module, kind: rotary.RopeKind, device: torch.device) -> bool:
        return rotary.agrees(module, modules.turning(kind), device, as_models=True)

    for kind, names in _found(model, rotary.is_candidate, rule_of, agrees, runtime, left):
        yield ModulePatch(
            slot="rope",
            target=_one_of(names),
            replace=lambda module, kind=kind: rotary.forward_with(module, modules.turning(kind)),
            reason=f"rotary embeddings of liger-kernel ({kind})",
            source=SOURCE,
        )


def _found(
    model: Model,
    is_candidate: Callable[[Module], bool],
    rule_of: Callable[[Module], Rule | None],
    agrees: Callable[[Module, Rule, torch.device], bool],
    runtime: Runtime | None,
    left: Counter[str],
) -> Iterator[tuple[Rule, frozenset[str]]]:
    """The names of modules by what they compute, each tried on the run's device if there is a run."""
    found, others = by_rule(model.module, is_candidate, rule_of)
    left.update(others)
    for rule, names in found.items():
        for name in names if runtime is not None else ():
            if not agrees(model.module.get_submodule(name), rule, runtime.device):
                raise RunError(
                    f"liger-kernel gives other numbers for {name} ({rule}) on {runtime.device} than the module does",
                    "In plain PyTorch both are the same operation: its kernel is wrong here, or rounds elsewhere.",
                    "Switch the feature off in the section liger.",
                )
        yield rule, names


def _modes(weight: torch.dtype, runtime: Runtime | None) -> list[tuple[torch.dtype, torch.dtype]]:
    """Data types of rows and weight that occur in the run."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(getattr(runtime, "precision", "fp32"))
    return [(rows, weight) for rows in dict.fromkeys((weight, half or weight))]


def _one_of(names: frozenset[str]) -> Callable[[str, Module], bool]:
    return lambda name, _: name in names
