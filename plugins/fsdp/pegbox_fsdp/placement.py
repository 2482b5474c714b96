"""Placing a model in shards by torch's FSDP2 (`fully_shard`).

Each layer is one group: its weights are gathered for its forward and backward and freed in between. What is in no layer
(embeddings, last norm, head) belongs to the root and stays gathered from the beginning of a forward to the end of its
backward, because a head is used apart from the module that holds it. The root is a small module around the network that
runs `Model.compute`; the network itself is never wrapped, and parameter names stay the names of the run.

In bf16, weights are gathered in bf16 and gradients averaged in float32; what is trained, and the optimizer's state,
keep their own data type. Gradients are averaged over processes, as the loop expects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pegbox.errors import ConfigError
from pegbox.types import Outputs
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pegbox_fsdp.asking import check
from pegbox_fsdp.config import FsdpConfig
from pegbox_fsdp.filling import Filler
from pegbox_fsdp.layers import layers_of
from pegbox_fsdp.shards import ShardedCheckpoint

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Batch
    from pegbox.types import Model, Need, Runtime
    from torch.optim import Optimizer

SHARD, REPLICA = "shard", "replica"


def place(ctx: Context, model: Model) -> Model:
    """Shard a model over the processes of the run.

    Raises:
        ConfigError: it has no layers that are seen, weights that cannot be sharded, or is compiled as one.
    """
    settings, runtime = ctx.section(FsdpConfig), ctx.runtime
    check(settings, runtime)
    trained = model.role == "policy"
    if not trained:
        model.module.requires_grad_(False)
    model.module.train(trained)
    layers = layers_of(settings, model)
    _refuse_quantized(model)
    _refuse_compiled_around(ctx, layers)
    mesh = _mesh(ctx, settings)
    arithmetic = torch.bfloat16 if runtime.precision == "bf16" else None
    reduced = torch.float32 if settings.reduce_dtype == "fp32" else torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=arithmetic, reduce_dtype=reduced)
    shared: dict[str, Any] = {"mesh": mesh}
    shared["offload_policy"] = CPUOffloadPolicy(pin_memory=True) if settings.offload else OffloadPolicy()

    filler = Filler(model.module, runtime, from_first=settings.load == "rank0")
    for name, layer in layers.items():
        filler.fill(layer, name)
        _require_one_dtype(layer, name)
        fully_shard(layer, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward, **shared)
    filler.fill(model.module, "")
    _require_one_dtype(model.module, "what is in no layer")
    root = ShardedForward(model, arithmetic, runtime.device)
    # The root's inputs are a batch, whose figures of floating point must stay as they are.
    fully_shard(root, mp_policy=replace(policy, cast_forward_inputs=False), reshard_after_forward=False, **shared)
    filler.finish()

    placement = ShardedPlacement(model.module, root, mesh, settings, runtime)
    return replace(model, placement=placement, forward=placement.forward)


def _mesh(ctx: Context, settings: FsdpConfig) -> DeviceMesh:
    """The processes as a line, or as copies x shards. A process that is alone makes a group of its own."""
    runtime = ctx.runtime
    if not distributed.is_initialized():
        backend = "nccl" if runtime.device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        ctx.exit.callback(distributed.destroy_process_group)
    shards = runtime.world_size // settings.replicas
    if settings.replicas == 1:
        return init_device_mesh(runtime.device.type, (shards,), mesh_dim_names=(SHARD,))
    return init_device_mesh(runtime.device.type, (settings.replicas, shards), mesh_dim_names=(REPLICA, SHARD))


def _refuse_quantized(model: Model) -> None:
    packed = [
        name for name, p in model.module.named_parameters() if type(p) is not nn.Parameter or not p.is_floating_point()
    ]
    if packed:
        raise ConfigError(
            f"the weights of {model.name} are quantized ({packed[0]} and more), and fsdp is to shard them",
            "What their scales belong to would be lost in a shard.",
            "Remove the plugin that quantizes, or fsdp.",
        )


def _refuse_compiled_around(ctx: Context, layers: dict[str, nn.Module]) -> None:
    for patch in ctx.kernel.patches.applied:
        inside = next(
            (n for n, layer in layers.items() if layer is not patch.module and layer in patch.module.modules()), None
        )
        if patch.patch.slot == "compile" and inside is not None:
            raise ConfigError(
                f"{patch.module_name or 'the model'} is compiled as one, and fsdp shards {inside} in it",
                "Weights are gathered between layers, which no graph may span.",
                "Set compile.scope to layers.",
            )


def _require_one_dtype(module: nn.Module, name: str) -> None:
    """Raise unless what is trained and not yet sharded has one data type: its gradients are averaged as one."""
    kinds = {p.dtype: n for n, p in module.named_parameters() if p.requires_grad and not isinstance(p, DTensor)}
    if len(kinds) > 1:
        listed = " and ".join(f"{n} in {str(dtype).removeprefix('torch.')}" for dtype, n in kinds.items())
        raise ConfigError(
            f"{name} trains weights of several data types: {listed}",
            "Their gradients are averaged together, in one data type.",
            "Set hf.trainable_dtype to float32, or the data type of the adapter to that of the other weights.",
        )


class ShardedForward(nn.Module):
    """The root: `Model.compute` on the network, under autocast; returns the fields of `Outputs` as a plain dict.

    FSDP2 looks for tensors in dicts, not in records, to learn when a backward begins.
    """

    def __init__(self, model: Model, arithmetic: torch.dtype | None, device: torch.device) -> None:
        super().__init__()
        self.network = model.module
        self._compute = model.compute
        self._arithmetic, self._device_type = arithmetic, device.type

    def forward(self, batch: Batch, needs: frozenset[Need]) -> dict[str, Any]:
        with torch.autocast(self._device_type, dtype=self._arithmetic, enabled=self._arithmetic is not None):
            outputs = self._compute(self.network, batch, needs)
        return {field.name: getattr(outputs, field.name) for field in fields(outputs)}


class ShardedPlacement:
    """The model in shards (`pegbox.types.Placement`)."""

    def __init__(
        self, module: nn.Module, root: nn.Module, mesh: DeviceMesh, settings: FsdpConfig, runtime: Runtime
    ) -> None:
        self._root = cast("FSDPModule", root)
        self._call = cast("Callable[..., dict[str, Any]]", root)
        self._mesh, self._settings, self._runtime = mesh, settings, runtime
        self._sharded = [part for part in root.modules() if isinstance(part, FSDPModule)]
        self._synchronizes = True
        self.parameters = {name: cast("DTensor", p) for name, p in module.named_parameters()}
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._checkpoint = ShardedCheckpoint(module, self.trained, mesh, runtime)
        copies = f" x {settings.replicas} copies" if settings.replicas > 1 else ""
        self.name = f"fsdp over {runtime.world_size // settings.replicas} processes{copies}"

    def forward(self, batch: Batch, needs: frozenset[Need]) -> Outputs:
        """Run the model. After a forward without gradients nothing stays gathered: weights may change."""
        outputs = Outputs(**self._call(batch, needs))
        if not torch.is_grad_enabled():
            for part in self._sharded:
                part.reshard()
        return outputs

    @contextmanager
    def synchronize_gradients(self, enabled: bool) -> Iterator[None]:
        synchronizes = enabled or self._settings.accumulate == "shards"
        if synchronizes is not self._synchronizes:
            self._synchronizes = synchronizes
            self._root.set_requires_gradient_sync(synchronizes)
            if self._settings.reshard_after_forward is False:
                # Weights do not change within a step: they stay gathered until its last backward.
                self._root.set_reshard_after_backward(synchronizes)
        self._root.set_is_last_backward(enabled)
        yield

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        """From the shards of this process and one sum over those of a copy; the host does not wait."""
        shards = [cast("DTensor", p.grad).to_local() for p in self.trained.values() if p.grad is not None]
        square = torch.zeros((), device=self._runtime.device)
        if filled := [shard for shard in shards if shard.numel()]:
            norms = torch.stack(torch._foreach_norm(filled, 2, dtype=torch.float32))
            square = norms.to(self._runtime.device).square().sum()
        distributed.all_reduce(square, group=self._mesh.get_group(SHARD))
        norm = square.sqrt()
        if max_norm is not None and filled:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(filled, factor.to(filled[0].device))
        return norm

    def save(self, folder: Path, optimizer: Optimizer) -> None:
        """Every process writes its shards."""
        self._checkpoint.save(folder, optimizer)

    def load(self, folder: Path, optimizer: Optimizer) -> None:
        self._checkpoint.load(folder, optimizer)
