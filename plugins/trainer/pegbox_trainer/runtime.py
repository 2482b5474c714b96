"""Devices and processes, by accelerate's `PartialState`.

It understands how the process was started (alone, by torchrun, by `accelerate launch`), chooses device and
backend (nccl on CUDA, gloo on CPU) and makes the process group. Everything beyond that is done here in a few
plain calls.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from pegbox.errors import ConfigError
from torch import distributed

from pegbox_trainer.config import Precision, TrainerConfig

if TYPE_CHECKING:
    from pegbox.context import Context, Rng


class ProcessRuntime:
    """One process of a run and its device (`pegbox.types.Runtime`).

    Attributes:
        precision: the arithmetic of forwards, for who places models.
    """

    precision: Precision

    def __init__(self, state: PartialState) -> None:
        self.rank: int = state.process_index
        self.local_rank: int = max(state.local_process_index, 0)
        self.world_size: int = state.num_processes
        self.device = _with_index(state.device)

    def barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()

    def gather_objects(self, value: object) -> list[object]:
        if self.world_size == 1:
            return [value]
        gathered: list[object] = [None] * self.world_size
        distributed.all_gather_object(gathered, value)
        return gathered

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        distributed.all_reduce(total)
        return total


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`: the form in which tensors name their device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def build_runtime(ctx: Context) -> ProcessRuntime:
    """Join the process group, choose the device, seed, and leave everything as it was when the run ends."""
    config = ctx.section(TrainerConfig)
    alone = not distributed.is_initialized()
    state = PartialState(cpu=config.device == "cpu" or not torch.accelerator.is_available())
    if state.num_processes > 1 and not distributed.is_initialized():
        # A second run in a process: accelerate remembers the first one, whose process group is gone.
        distributed.init_process_group(state.backend)
    if alone and distributed.is_initialized():
        ctx.exit.push(partial(_leave, state))
    runtime = ProcessRuntime(state)
    _check(runtime, config)
    if runtime.rank == 0:
        require_writable(ctx.folder)
    runtime.precision = resolve_precision(config, runtime.device)
    if config.deterministic:
        _compute_deterministically(ctx)
    seed_process(ctx.rng("trainer/setup"))
    return runtime


def require_writable(folder: Path) -> None:
    """Raise ConfigError if a run could not write into its folder; nothing of the attempt stays."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output: {folder} cannot be written ({error.strerror})",
            "A run keeps its record, its checkpoints and what it made there.",
            "Type output=FOLDER with one that you may write to.",
        ) from error
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def resolve_precision(config: TrainerConfig, device: torch.device) -> Precision:
    """What `auto` means on this device; refuses what the device cannot compute."""
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "auto":
        return "bf16" if native else "fp32"
    if config.precision == "bf16" and device.type == "cuda" and not native:
        raise ConfigError(
            f"trainer.precision is bf16, but {torch.cuda.get_device_name(device)} has no bf16 arithmetic",
            "GPUs before compute capability 8.0 only emulate it.",
            "Set trainer.precision to fp16 or fp32.",
        )
    return config.precision


def _check(runtime: ProcessRuntime, config: TrainerConfig) -> None:
    if config.device == "cpu" and runtime.device.type != "cpu":
        raise ConfigError(
            f"trainer.device is cpu, but this process already uses {runtime.device}",
            "accelerate fixes the device of a process once.",
            "Start the run in a process of its own.",
        )
    # What torchrun and `accelerate launch` tell each process they start.
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != runtime.world_size:
        raise ConfigError(
            f"{started} processes were started, but accelerate joined {runtime.world_size} on {runtime.device}",
            "Each would train alone and write the same folder.",
            "Set trainer.device=cpu, or start one process.",
        )


def _leave(state: PartialState, failed: type[BaseException] | None, *_: object) -> None:
    """Leave the process group, all processes together; after an error nobody is waited for: another may be gone."""
    if failed is None:
        distributed.barrier()
    state.destroy_process_group()


def seed_process(rng: Rng) -> None:
    """Seed the global generators of Python, numpy and torch (every device)."""
    import numpy

    random.seed(rng.seed)
    numpy.random.seed(rng.seed % 2**32)
    torch.manual_seed(rng.seed)


def _compute_deterministically(ctx: Context) -> None:
    """Ask torch for deterministic algorithms, until the run ends."""
    # cuBLAS reads its workspace setting from the environment alone, when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False

    def restore() -> None:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]

    ctx.exit.callback(restore)
