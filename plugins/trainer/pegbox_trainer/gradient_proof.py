"""The proof that training reaches what it should: looked for in the first steps, before a run costs anything.

    what a run trains        must receive a gradient; under an adapter one that is not zero, of each of its tensors
    what it does not step    must receive none

A zero gradient alone proves nothing where it must be zero: the first matrix of a low-rank adapter gets none until its
second one, which begins at zero, has moved. So steps are counted that began after one with a learning rate above zero,
and one gradient in all of them is enough. Of experts that are modules of their own, any one of a list stands for all,
because a router may pass some over; single token rows may be zero as long as the token does not occur.

Norms are collected on the device and read where the loop waits for it anyway, when it logs next; afterwards nothing is
left of the proof.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from pegbox import hooks
from pegbox.errors import RunError
from pegbox.events import Event, GradientsReady, Logged, RunStarted
from torch import Tensor

from pegbox_trainer.config import TrainerConfig

if TYPE_CHECKING:
    from pegbox.context import Context

SHOWN = 3
EXPERT = re.compile(r"(experts?)\.\d+\.")
RARE = ("trainable_tokens_delta",)
"""What occurs in names of parameters that only some rows of data reach."""


def gradient_proof(ctx: Context, event: Event, proof: GradientProof | None) -> GradientProof | None:
    """Tell the proof of an event: one begins when a run does, and is None again once it is made.

    Raises:
        RunError: a trained parameter got no gradient, or one that is not trained got one.
    """
    if isinstance(event, RunStarted):
        return GradientProof(ctx, event) if ctx.section(TrainerConfig).gradient_proof.steps else None
    if proof is not None and isinstance(event, GradientsReady):
        proof.look(event)
    if proof is not None and isinstance(event, Logged) and proof.read():
        return None
    return proof


class GradientProof:
    """What was seen in the first steps of a run.

    P parameters that the optimizer steps. `_seen_P` counts on the device where a gradient was not zero, `_had` on the
    host where there was one at all; both are summed over ranks, which may hold parts of a parameter.
    """

    def __init__(self, ctx: Context, started: RunStarted) -> None:
        self._runtime = ctx.runtime
        self._settings = ctx.section(TrainerConfig).gradient_proof
        self._adapted = ctx.owned(hooks.apply_adapters)
        self._last = ctx.total_steps
        groups = started.job.optimization.optimizer.param_groups
        stepped = {id(parameter) for group in groups for parameter in group["params"]}
        named = list(started.job.model.module.named_parameters())
        self._trained = [(name, parameter) for name, parameter in named if id(parameter) in stepped]
        self._others = [(name, parameter) for name, parameter in named if id(parameter) not in stepped]
        self._seen_P = torch.zeros(len(self._trained), device=self._runtime.device)
        self._overflows = torch.zeros((), device=self._runtime.device)
        self._had = [False] * len(self._trained)
        self._counted, self._moved, self._ready = 0, False, False

    def look(self, event: GradientsReady) -> None:
        """Look at the gradients of one step, unless enough was seen; the device is not waited for."""
        if self._ready:
            return
        self._refuse_gradients_of_others()
        self._look()
        self._counted += self._moved or not self._adapted
        self._moved = self._moved or any(float(group["lr"]) > 0 for group in event.optimizer.param_groups)
        self._ready = self._enough or event.step == self._last

    @property
    def _enough(self) -> bool:
        return self._counted >= self._settings.steps

    def read(self) -> bool:
        """Whether the proof is made; waits for the device if enough was seen.

        Raises:
            RunError: a trained parameter got no gradient.
        """
        if not self._ready:
            return False
        had_P = torch.tensor(self._had, dtype=torch.float32, device=self._runtime.device)
        read = self._runtime.sum(torch.cat([self._seen_P, had_P, self._overflows[None]])).tolist()
        count = len(self._trained)
        seen, had, overflows = read[:count], read[count:-1], read[-1]
        unproven = self._unproven(seen if self._enough else had, had)
        if overflows and unproven and self._enough:
            # A gradient scaler skips steps that overflow: then nothing may have moved yet.
            self._counted, self._ready = 0, False
            self._overflows.zero_()
            return False
        self._refuse(unproven)
        return True

    def _look(self) -> None:
        present = [(at, p.grad) for at, (_, p) in enumerate(self._trained) if p.grad is not None]
        if not present:
            return
        for at, _ in present:
            self._had[at] = True
        local = [grad.to_local() if hasattr(grad, "to_local") else grad for _, grad in present]
        norms = torch.stack([norm.float().to(self._seen_P.device) for norm in _largest(local)])
        finite = torch.isfinite(norms)
        pin = self._seen_P.device.type == "cuda"
        at = torch.tensor([at for at, _ in present], pin_memory=pin).to(self._seen_P.device, non_blocking=True)
        self._seen_P.index_add_(0, at, ((norms > 0) & finite).float())
        self._overflows += (~finite).any()

    def _refuse_gradients_of_others(self) -> None:
        reached = [name for name, parameter in self._others if parameter.grad is not None]
        if reached:
            raise RunError(
                f"{_grouped(reached)} received a gradient, but no optimizer steps it",
                "It takes part in training by mistake: it was unfrozen after the optimizer was built.",
                "Remove the plugin that unfreezes it, or let it do so before the optimizer is built.",
            )

    def _unproven(self, seen: list[float], had: list[float]) -> list[str]:
        """Trained parameters without a gradient; under an adapter, also those where it was zero."""
        proven = {
            _general(name)
            for (name, _), nonzero, any_at_all in zip(self._trained, seen, had, strict=True)
            if any_at_all and (nonzero or not self._adapted or any(mark in name for mark in RARE))
        }
        missing = [name for name, _ in self._trained if _general(name) not in proven]
        return [name for name in missing if not any(re.search(p, name) for p in self._settings.allow)]

    def _refuse(self, unproven: list[str]) -> None:
        if unproven:
            kind = "tensors of the adapter" if self._adapted else "trained parameters"
            raise RunError(
                f"{len(unproven)} {kind} received no gradient in the first steps: {_grouped(unproven)}",
                "The loss does not depend on them, so training would leave them as they are.",
                "Look at what detaches them or leaves them out; freeze them, or name them with a regular expression in "
                "trainer.gradient_proof.allow if that is meant.",
            )


def _largest(tensors: list[Tensor]) -> list[Tensor]:
    """The largest absolute value of each tensor; an empty one has 0."""
    full = [tensor for tensor in tensors if tensor.numel()]
    norms = iter(torch._foreach_norm(full, float("inf")) if full else [])
    return [next(norms) if tensor.numel() else tensor.new_zeros(()) for tensor in tensors]


def _general(name: str) -> str:
    """A name without the number of an expert that is a module of its own."""
    return EXPERT.sub(r"\1.*.", name)


def _grouped(names: Iterable[str]) -> str:
    """Names without the numbers of layers, each once with how many it stands for; at most a few."""
    counts: dict[str, int] = {}
    for name in names:
        general = re.sub(r"\.\d+\.", ".*.", name)
        counts[general] = counts.get(general, 0) + 1
    shown = [name if count == 1 else f"{name} ({count})" for name, count in list(counts.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")
