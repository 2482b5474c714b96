"""Where the library's kernels run: on a GPU. Its Triton code has no other way, and no reference on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    import torch


def require_gpu() -> None:
    """Raise if there is no GPU at all: before rows are made and a model is read.

    Raises:
        ConfigError: there is none, and Triton's interpreter is off.
    """
    import torch

    if not torch.cuda.is_available():
        require_kernels_run_on(torch.device("cpu"))


def require_kernels_run_on(device: torch.device) -> None:
    """Raise unless Triton's kernels run there.

    Raises:
        ConfigError: it is a CPU, and Triton's interpreter is off.
    """
    import torch
    from pegbox_kernels.dispatch import runs_kernels

    if device.type == "cpu" and not runs_kernels(torch.empty(0, device=device)):
        raise ConfigError(
            "liger is in plugins, but this run is on a CPU",
            "The kernels of liger-kernel are written in Triton and run on a GPU only.",
            "Remove liger from plugins, or run where there is a GPU.",
        )
