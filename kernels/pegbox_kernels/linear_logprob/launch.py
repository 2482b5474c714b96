"""How the kernels are launched: settings by the size of a row and the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver

from pegbox_kernels.dispatch import INTERPRETED


class Launch(NamedTuple):
    """Warps of a program, 16-byte loads that each thread has in flight, and programs of the grid at most."""

    warps: int
    loads: int
    programs: int

    def lanes(self, itemsize: int) -> int:
        """Columns that the warps of a row read with one load each."""
        return self.warps * 32 * (16 // itemsize)

    def grid(self, rows: int) -> tuple[int]:
        """Programs that take all rows in as few rounds as `programs` would, and the same number of rows each."""
        rounds = -(-rows // self.programs)
        return (-(-rows // rounds),)


GRADIENT_WARPS, GRADIENT_LOADS = 32, 2
"""Two reads and one write by the one program of a multiprocessor: 32 KiB of a row in flight. An H100 took 1.40 ms for
4096 rows of 201088, and 1.46 with 16 warps of 4 loads, which are as many bytes."""
ONE_PASS_WARPS, ONE_PASS_LOADS = 4, 4
"""One read and one write, and the warps of a program wait for each other at every tile: so few warps, many programs.
8 warps of 2 loads were 2 % faster (0.69 ms for 2048 rows, not 0.71), but with triton 3.9 they spill 8 bytes."""
READ_WARPS, READ_LOADS = 8, 4
"""One read, without a gradient: what `logprob` measured best."""
BACKWARD_WARPS, BACKWARD_LOADS = 8, 2
"""One read and one write, as there: many programs with little each."""
RESIDENT_WARPS = 64
"""Warps that a multiprocessor holds."""
LARGEST_PROGRAM = 1024
"""Threads of a program at most: 32 warps of NVIDIA, 16 of AMD's data-center GPUs."""


class Device(NamedTuple):
    """What a launch depends on; the defaults are an H100's, for kernels that are only compiled or interpreted."""

    multiprocessors: int = 132
    cache_bytes: int = 50 << 20
    warp: int = 32


def device_of(tensor: Tensor) -> Device:
    if not tensor.is_cuda:
        return Device() if INTERPRETED else Device(warp=driver.active.get_current_target().warp_size)
    found = torch.cuda.get_device_properties(tensor.device)
    return Device(found.multi_processor_count, found.L2_cache_size, found.warp_size)


def forward_launch(row_bytes: int, itemsize: int, gradient: bool, device: Device) -> Launch:
    """With a gradient a program on each multiprocessor: all compute, and few enough rows are to be read again."""
    if not gradient:
        return _streaming(READ_WARPS, READ_LOADS, row_bytes // itemsize, itemsize, device)
    launch = _streaming(GRADIENT_WARPS, GRADIENT_LOADS, row_bytes // itemsize, itemsize, device)
    cached = max(device.cache_bytes // row_bytes, device.multiprocessors)
    return launch._replace(programs=min(cached, launch.programs))


def one_pass_launch(row_bytes: int, itemsize: int, device: Device) -> Launch:
    """As many programs as fit: nothing is read twice."""
    return _streaming(ONE_PASS_WARPS, ONE_PASS_LOADS, row_bytes // itemsize, itemsize, device)


def backward_launch(row_bytes: int, itemsize: int, device: Device) -> Launch:
    """As many programs as fit: nothing is read twice."""
    return _streaming(BACKWARD_WARPS, BACKWARD_LOADS, row_bytes // itemsize, itemsize, device)


def _streaming(warps: int, loads: int, vocab: int, itemsize: int, device: Device) -> Launch:
    """As many programs as multiprocessors hold; fewer warps for a small vocabulary, or where they are wide."""
    while warps * device.warp > LARGEST_PROGRAM:
        warps, loads = warps // 2, loads * 2
    while warps > 1 and Launch(warps, loads, 0).lanes(itemsize) > vocab:
        warps //= 2
    return Launch(warps, loads, device.multiprocessors * RESIDENT_WARPS // warps)
