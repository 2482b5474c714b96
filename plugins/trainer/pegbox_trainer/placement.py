"""Placing a model: on one device, or replicated over processes by DDP.

DDP averages gradients over processes, so the loop multiplies its loss by their number: what is stepped with
is the gradient of the sum over all ranks. The module itself is never wrapped: a small module around it runs
`Model.compute` under autocast, and that one goes into DDP, so that parameter names stay the names of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pegbox_trainer.config import Precision, TrainerConfig
from pegbox_trainer.runtime import resolve_precision
from pegbox_trainer.states import read_state, undamaged, write_state

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Batch
    from pegbox.types import Model, Need, Outputs, Runtime
    from torch.optim import Optimizer

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.pt"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def place(ctx: Context, model: Model) -> Model:
    """Put a model on the device of its process; the policy into DDP if there are several processes."""
    config, runtime = ctx.section(TrainerConfig), ctx.runtime
    trained = model.role == "policy"
    if not trained:
        model.module.requires_grad_(False)
    if any(tensor.device != runtime.device for tensor in _tensors(model.module)):
        model.module.to(runtime.device)
    model.module.train(trained)

    forward: nn.Module = AutocastForward(model, resolve_precision(config, runtime.device), runtime.device)
    if trained and runtime.world_size > 1 and any(p.requires_grad for p in model.module.parameters()):
        forward = DistributedDataParallel(
            forward,
            **_keep_buffers_apart(),
            gradient_as_bucket_view=True,
            find_unused_parameters=config.find_unused_parameters,
        )
    return replace(model, placement=ReplicatedPlacement(model.module, forward, runtime), forward=forward)


def _keep_buffers_apart() -> dict[str, bool]:
    """Never broadcast buffers in a forward; torch 2.13 renamed the argument."""
    name = "forward_sync_buffers"
    return {name if name in signature(DistributedDataParallel).parameters else "broadcast_buffers": False}


class AutocastForward(nn.Module):
    """The forward that is placed: `Model.compute` on the module, under autocast."""

    def __init__(self, model: Model, precision: Precision, device: torch.device) -> None:
        super().__init__()
        self.network = model.module
        self._compute = model.compute
        self._device_type = device.type
        self._dtype = AUTOCAST.get(precision)

    def forward(self, batch: Batch, needs: frozenset[Need]) -> Outputs:
        if self._dtype is None:
            return self._compute(self.network, batch, needs)
        with torch.autocast(self._device_type, dtype=self._dtype):
            return self._compute(self.network, batch, needs)


class ReplicatedPlacement:
    """The whole model on every process (`pegbox.types.Placement`)."""

    def __init__(self, module: nn.Module, forward: nn.Module, runtime: Runtime) -> None:
        self._module, self._forward, self._runtime = module, forward, runtime
        self._ddp = forward if isinstance(forward, DistributedDataParallel) else None
        self.name = f"ddp over {runtime.world_size} processes" if self._ddp else str(runtime.device)
        self._trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._buffers = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}

    def synchronize_gradients(self, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext() if enabled or self._ddp is None else self._ddp.no_sync()

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self._trained.values(), max_norm, norm)
        return norm

    def save(self, folder: Path, optimizer: Optimizer) -> None:
        """Rank 0 writes: all ranks hold the same."""
        if self._runtime.rank == 0:
            tensors = {name: p.detach().contiguous() for name, p in self._trained.items()}
            tensors.update((name, buffer.contiguous()) for name, buffer in self._changed_buffers())
            save_file(tensors, folder / WEIGHTS)
            write_state(folder / OPTIMIZER, optimizer.state_dict(), "the optimizer's state")

    def load(self, folder: Path, optimizer: Optimizer) -> None:
        if not (folder / WEIGHTS).is_file():
            raise _other_placement(folder)
        with undamaged(folder / WEIGHTS):
            saved = load_file(folder / WEIGHTS)
        present: dict[str, Tensor] = {**dict(self._module.named_buffers()), **self._trained}
        unlike = sorted(saved.keys() - present.keys() | self._trained.keys() - saved.keys())
        unlike += [name for name in saved if name not in unlike and saved[name].shape != present[name].shape]
        if unlike:
            raise _other_model(folder, unlike)
        with torch.no_grad():
            for name, tensor in saved.items():
                present[name].copy_(tensor)
        state = read_state(folder / OPTIMIZER)
        groups, now = state["param_groups"], optimizer.state_dict()["param_groups"]
        if [group.get("param_names") for group in groups] != [group.get("param_names") for group in now]:
            raise _other_model(folder, ["the optimizer's parameter groups"])
        optimizer.load_state_dict(state)

    def _changed_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that were written to or replaced since the model was placed."""
        for name, buffer in self._module.named_buffers():
            before, version = self._buffers.get(name, (None, -1))
            if buffer is not before or buffer._version != version:
                yield name, buffer


def _other_model(folder: Path, unlike: list[str]) -> RunError:
    more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
    return RunError(
        f"{folder} holds other trained parameters than this run: {', '.join(unlike[:3])}{more}",
        "Their names and shapes must be the same to go on exactly.",
        "Resume with the config that the checkpoint was made with: see config.yaml beside it.",
    )


def _other_placement(folder: Path) -> RunError:
    return RunError(
        f"{folder} has no {WEIGHTS}",
        "It was written by a run whose model was placed in another way, in shards for instance.",
        "Resume with the plugins and `use` that the run began with: see config.yaml beside it.",
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
