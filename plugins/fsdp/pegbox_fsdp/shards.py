"""Shards of a checkpoint, written and read by every process (torch.distributed.checkpoint).

shards/               trained weights and the optimizer's sharded state; any number of processes reads them
optimizer.pt          what is left of the optimizer's state: groups, step counts
buffers.pt            buffers that changed since the model was placed
packed/rank-00000.pt  optimizer state that is packed (8-bit states): for the same number of processes only
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import PluginError, RunError
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate, Shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pegbox.types import Runtime
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

SHARDS, OPTIMIZER, BUFFERS, PACKED = "shards", "optimizer.pt", "buffers.pt", "packed"
WEIGHT, STATE = "weight/", "state/"


class ShardedCheckpoint:
    """Saves and loads what is trained of one model, and its optimizer."""

    def __init__(self, module: nn.Module, trained: Mapping[str, DTensor], mesh: DeviceMesh, runtime: Runtime) -> None:
        self._module, self._trained, self._mesh, self._runtime = module, trained, mesh, runtime
        self._buffers = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}

    # ---- saving ----

    def save(self, folder: Path, optimizer: Optimizer) -> None:
        state = optimizer.state_dict()
        sharded, packed, rest = _parted(state["state"])
        weights = {WEIGHT + name: p.detach() for name, p in self._trained.items()}
        dcp.save({**weights, **sharded}, storage_writer=FileSystemWriter(folder / SHARDS))
        if packed:
            _write(folder / PACKED / _rank_file(self._runtime.rank), packed)
        if self._runtime.rank == 0:
            _write(folder / OPTIMIZER, {"state": rest, "param_groups": state["param_groups"]})
            _write(folder / BUFFERS, dict(self._changed_buffers()))

    def _changed_buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in self._module.named_buffers():
            before, version = self._buffers.get(name, (None, -1))
            if buffer is not before or buffer._version != version:
                yield name, buffer

    # ---- loading ----

    def load(self, folder: Path, optimizer: Optimizer) -> None:
        if not (folder / SHARDS).is_dir():
            raise RunError(
                f"{folder} holds no shards",
                "It was written by a run that did not shard its model.",
                "Resume with the plugins that the run began with: see config.yaml beside it.",
            )
        reader = FileSystemReader(folder / SHARDS)
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        state = _read(folder / OPTIMIZER)
        self._require_same(folder, stored, state, optimizer)
        wanted: dict[str, Tensor] = {WEIGHT + name: p.detach() for name, p in self._trained.items()}
        wanted |= {
            key: self._room(kept, sharded=state["state"][number][name]["sharded"])
            for key, kept in stored.items()
            if key.startswith(STATE)
            for number, name in [_place(key)]
        }
        dcp.load(wanted, storage_reader=reader)
        packed = self._packed(folder)
        for number, values in state["state"].items():
            for name, value in values.items():
                if _is_mark(value):
                    key = f"{STATE}{number}/{name}"
                    values[name] = wanted[key] if key in wanted else self._unpacked(packed[key], value)
        optimizer.load_state_dict(state)
        present = dict(self._module.named_buffers())
        for name, buffer in _read(folder / BUFFERS).items():
            present[name].copy_(buffer)

    def _room(self, kept: TensorStorageMetadata, *, sharded: bool) -> DTensor:
        """An empty tensor like one that was stored."""
        at = Shard(0) if sharded else Replicate()
        placements = [*([Replicate()] * (self._mesh.ndim - 1)), at]
        device = next(iter(self._trained.values())).device
        whole = torch.empty(kept.size, dtype=kept.properties.dtype, device="meta")
        rank, shards = self._mesh.get_local_rank(self._mesh.ndim - 1), self._mesh.size(self._mesh.ndim - 1)
        local = torch.empty(
            _part(whole, rank, shards).shape if sharded else whole.shape, dtype=whole.dtype, device=device
        )
        shape: dict[str, Any] = {"shape": whole.shape, "stride": whole.stride()}
        return DTensor.from_local(local, self._mesh, placements, run_check=False, **shape)

    def _packed(self, folder: Path) -> dict[str, Tensor]:
        files = sorted((folder / PACKED).glob("*.pt"))
        if files and len(files) != self._runtime.world_size:
            raise RunError(
                f"{folder} holds packed optimizer states of {len(files)} processes, this run has "
                f"{self._runtime.world_size}",
                "A packed state cannot be cut at another place.",
                f"Resume with --processes {len(files)}.",
            )
        return _read(folder / PACKED / _rank_file(self._runtime.rank)) if files else {}

    def _unpacked(self, local: Tensor, mark: dict[str, Any]) -> DTensor:
        parameter = next(iter(self._trained.values()))
        shape: dict[str, Any] = {"shape": torch.Size(mark["size"]), "stride": tuple(mark["stride"])}
        local = local.to(parameter.device)
        return DTensor.from_local(local, self._mesh, parameter.placements, run_check=False, **shape)

    def _require_same(self, folder: Path, stored: Mapping[str, Any], state: Any, optimizer: Optimizer) -> None:
        sizes = {key.removeprefix(WEIGHT): kept.size for key, kept in stored.items() if key.startswith(WEIGHT)}
        shapes = {name: p.shape for name, p in self._trained.items()}
        unlike = sorted(name for name in sizes.keys() | shapes.keys() if sizes.get(name) != shapes.get(name))
        groups, now = state["param_groups"], optimizer.state_dict()["param_groups"]
        if [group.get("param_names") for group in groups] != [group.get("param_names") for group in now]:
            unlike.append("the optimizer's parameter groups")
        if unlike:
            more = f" and {len(unlike) - 3} more" if len(unlike) > 3 else ""
            raise RunError(
                f"{folder} holds other trained parameters than this run: {', '.join(unlike[:3])}{more}",
                "Their names and shapes must be the same to go on exactly.",
                "Resume with the config that the checkpoint was made with: see config.yaml beside it.",
            )


def _part(whole: Tensor, rank: int, shards: int) -> Tensor:
    """What a process holds of a tensor: rows are dealt out as `torch.chunk` does; the last ones may have none."""
    chunks = torch.chunk(whole, shards, dim=0)
    return chunks[rank] if rank < len(chunks) else whole[:0]


def _parted(states: Mapping[int, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[int, Any]]:
    """State in shards, packed state of this process, and the rest, in which marks stand for the others."""
    sharded: dict[str, Tensor] = {}
    packed: dict[str, Tensor] = {}
    rest: dict[int, dict[str, Any]] = {}
    for number, values in states.items():
        rest[number] = dict(values)
        for name, value in values.items():
            if not isinstance(value, DTensor):
                continue
            key, local = f"{STATE}{number}/{name}", value.to_local()
            if type(local) is Tensor:
                sharded[key] = value.detach()
            else:
                packed[key] = local.detach()
            cut = any(at.is_shard() for at in value.placements)
            rest[number][name] = {"sharded": cut, "size": list(value.shape), "stride": list(value.stride())}
    return sharded, packed, rest


def _is_mark(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"sharded", "size", "stride"}


def _place(key: str) -> tuple[int, str]:
    number, _, name = key.removeprefix(STATE).partition("/")
    return int(number), name


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _write(path: Path, value: object) -> None:
    """Write plain data and tensors; what could not be read back without running code is refused here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    try:
        _read(path)
    except Exception as error:
        raise PluginError(
            f"the optimizer's state does not read back from {path.name}: {str(error).splitlines()[0]}",
            "A checkpoint holds plain data and tensors only, so that reading one never runs code.",
            "Use another optimizer, such as adamw.",
        ) from error


def _read(path: Path) -> dict[Any, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
