"""What patch records promise: they act on one model, leave every other alone, and can be taken back without a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pegbox import hooks
from pegbox.errors import PatchError
from pegbox.patches import PatchLog
from pegbox.rows import Batch
from pegbox.testing.fingerprint import foreign_classes_stay_as_they_are
from pegbox.testing.libraries import torch
from pegbox.testing.rule import RuleBroken, require
from pegbox.testing.subject import Subject
from pegbox.types import Model, ModulePatch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from pegbox.context import Context

Records = Callable[[Model], Sequence[ModulePatch]]
"""The patches of a plugin for one model: those of `patch_attention`, and of `patch_modules` at every stage."""
FIX_CLASS = "Return a new module or forward from `replace`; assign to nothing but what the kernel gives you."


def records_of(subject: Subject, ctx: Context) -> Records:
    """The patches that a plugin answers with, in the order of a run; adapters are not applied."""

    def records(model: Model) -> list[ModulePatch]:
        found = list(subject.answer(ctx, hooks.patch_attention, ctx, model) or ())
        for stage in get_args(hooks.Stage):
            found += subject.answer(ctx, hooks.patch_modules, ctx, model, stage) or ()
        return found

    return records


def are_declared(records: Records, model: Model) -> None:
    """There is at least one patch for the model, and each says why."""
    found = records(model)
    require(
        bool(found),
        f"there is no patch for {model.name} (traits: {', '.join(sorted(model.traits))})",
        "Rules about patches hold for nothing if there is no patch.",
        "Set `config` so that the plugin patches, or override `model` with one that it patches.",
    )
    silent = [patch.slot for patch in found if not patch.reason.strip()]
    require(
        not silent,
        f"the patch of the slot {', '.join(silent)} gives no reason",
        "`pegbox plan --model` and every collision show the reason.",
        "Set reason to one sentence.",
    )


def act(records: Records, model: Model, batch: Batch) -> None:
    """Every patched module is called in a forward."""
    log = _apply(records, model)
    _forward(model, batch)
    try:
        log.verify()
    except PatchError as error:
        raise RuleBroken(error.what, error.why, "Patch what the forward really calls.") from error
    finally:
        log.undo()


def are_undone(records: Records, model: Model, batch: Batch) -> None:
    """After undo the module tree, its bytes, its config and its results are those from before."""
    answer, before = _forward(model, batch), snapshot(model.module)
    log = _apply(records, model)
    _forward(model, batch)
    log.undo()
    after, again = snapshot(model.module), _forward(model, batch)
    different = before.differences(after)
    require(
        not different,
        f"after undo the model differs in {', '.join(different[:3])}",
        "The kernel promises that a patch can be taken back; a plan with --model relies on it.",
        "Let `replace` make a new module or forward that shares the old one's parameters; change neither.",
    )
    require(
        bool((answer == again).all()),
        "after undo the forward gives other numbers",
        "Something outside of the model still acts: a global, a registry, a changed class.",
        FIX_CLASS,
    )


def leave_other_models_alone(records: Records, model: Model, other: Model, batch: Batch) -> None:
    """A second model in the process computes what it computed, bit for bit, while the first one is patched."""
    answer, before = _forward(other, batch), snapshot(other.module)
    with foreign_classes_stay_as_they_are("the patch"):
        log = _apply(records, model)
        _forward(model, batch)
        different, again = before.differences(snapshot(other.module)), _forward(other, batch)
        log.undo()
    require(
        not different and bool((answer == again).all()),
        f"patching one model changed another one: {', '.join(different[:3]) or 'its results'}",
        "A run may hold a policy and a reference; a patch is for one of them.",
        FIX_CLASS,
    )


def keep_gradients(records: Records, model: Model, batch: Batch) -> None:
    """Every parameter that had a gradient before has a finite one through the patched modules."""
    before = _with_gradient(model, batch)
    log = _apply(records, model)
    after = _with_gradient(model, batch)
    log.undo()
    lost = sorted(before - after)
    require(
        not lost,
        f"with the patch {len(lost)} of {len(before)} parameters have no finite gradient: {', '.join(lost[:3])}",
        "A parameter that is cut off is not trained, silently.",
        "Use the old module's own parameters, without detach(); a custom kernel needs a backward.",
    )


def _apply(records: Records, model: Model) -> PatchLog:
    log = PatchLog()
    try:
        log.apply(model, [("the plugin", records(model))])
    except PatchError as error:
        raise RuleBroken(
            error.what, error.why or "A patch that cannot be applied stops the run.", error.next
        ) from error
    return log


def _forward(model: Model, batch: Batch) -> Tensor:
    with torch().no_grad():
        logits = model.compute(model.module, batch, frozenset({"logits"})).logits_NV
    assert logits is not None, "compute returns what was asked for"
    return logits


def _with_gradient(model: Model, batch: Batch) -> set[str]:
    logps = model.compute(model.module, batch, frozenset({"logps"})).logps_N
    assert logps is not None, "compute returns what was asked for"
    logps.sum().backward()
    named = [(name, p.grad) for name, p in model.module.named_parameters() if p.grad is not None]
    found = {name for name, gradient in named if bool(gradient.isfinite().all()) and bool(gradient.any())}
    model.module.zero_grad()
    return found


@dataclass(frozen=True)
class Snapshot:
    """A module tree: which objects, with which attributes and hooks, holding which bytes, under which config."""

    modules: Mapping[str, tuple[Any, ...]]
    tensors: Mapping[str, tuple[Any, ...]]
    config: Mapping[str, str]

    def differences(self, other: Snapshot) -> list[str]:
        """What differs, by name."""
        found = []
        for label, mine, others in (
            ("module", self.modules, other.modules),
            ("tensor", self.tensors, other.tensors),
            ("config", self.config, other.config),
        ):
            names = [*mine, *(name for name in others if name not in mine)]
            found += [f"{label} {name or '(root)'}" for name in names if mine.get(name) != others.get(name)]
        return found


def snapshot(module: Module) -> Snapshot:
    """Everything of a model that undoing a patch must bring back."""
    modules = {name: (id(part), type(part), *_of_instance(part)) for name, part in module.named_modules()}
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    tensors = {name: (id(tensor), tensor.requires_grad, tensor.dtype, _bytes(tensor)) for name, tensor in named}
    config = {name: repr(value) for name, value in vars(getattr(module, "config", object)).items()}
    return Snapshot(modules, tensors, config)


def _of_instance(module: Module) -> tuple[Any, ...]:
    """The names of an instance's attributes, its training flag, its own forward, and how many hooks hang on it."""
    own = vars(module)
    hooked = tuple(
        len(value) for name, value in sorted(own.items()) if name.endswith("_hooks") and hasattr(value, "__len__")
    )
    return frozenset(own), module.training, id(own.get("forward")), hooked


def _bytes(tensor: Tensor) -> bytes:
    raw: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch().uint8).numpy().tobytes()
    return raw
