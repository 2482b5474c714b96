"""Sampling from a module that is being trained, without leaving a trace.

Evaluation mode switches dropout and gradient checkpointing off (under which transformers gives up its cache), and each
part's mode is put back. Attention keeps the implementation of training: with keys from a cache, or with a mask, ours
computes dense attention by that mask. Layers that torch compiled run as written, for shapes change with each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pegbox.types import Runtime
    from torch.nn import Module

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def sampling_from(module: Module, runtime: Runtime) -> Iterator[None]:
    """In evaluation mode, without gradients, in the run's arithmetic; its random generators are put back."""
    trained = [part for part in module.modules() if part.training]
    kind, dtype = runtime.device.type, AUTOCAST.get(runtime.precision)
    devices = [runtime.device] if kind == "cuda" else []
    arithmetic: Any = torch.autocast(kind, dtype=dtype) if dtype is not None else nullcontext()
    with torch.random.fork_rng(devices=devices), torch.no_grad(), arithmetic, torch.compiler.set_stance("force_eager"):
        module.eval()
        try:
            yield
        finally:
            for part in trained:
                part.training = True


def bare(module: Any) -> Any:
    """The language model inside a PEFT wrapper, or the module itself; adapters are layers of it either way."""
    unwrap = getattr(module, "get_base_model", None)
    return module if unwrap is None else unwrap()
