"""Keeping what attention returned while the rest of a layer is computed again.

Attention is the part of a layer whose cost grows with the square of a row's length, and what its backward needs beside
its inputs, the output and one log-sum-exp for each head and token, is small. So a layer that is computed again may keep
these two, and its attention is computed once. torch's selective checkpointing does it, operator by operator
(`create_selective_checkpoint_contexts`); here is which operators are attention: by their names, because every library
registers its own (torch's scaled dot products and `_varlen_attn`, `flash_attn`, `pegbox_kernels`).

An operator that draws random numbers is computed again: skipping it would shift the numbers that come after it. An
attention that is no operator of torch (a plain call into a compiled library) is not seen, and is computed again too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

ATTENTION = re.compile(r"attention|attn|flash_fwd")
BACKWARD = re.compile(r"backward|bwd|grad")
DROPOUTS = ("dropout_p", "p_dropout", "dropout")
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class AttentionKeeper:
    """Makes the contexts of one selective checkpoint after the other.

    Attributes:
        operators: results of attention that were kept so far.
    """

    def __init__(self) -> None:
        self.operators = 0

    def contexts(self) -> Contexts:
        """For the argument `context_fn` of `torch.utils.checkpoint.checkpoint`."""

        def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            if not can_be_kept(operator, args, kwargs):
                return CheckpointPolicy.PREFER_RECOMPUTE
            self.operators += 1
            return CheckpointPolicy.MUST_SAVE

        made: Contexts = create_selective_checkpoint_contexts(policy)
        return made


class AttentionBytes(TorchDispatchMode):
    """Within it, `total` counts what an `AttentionKeeper` would keep."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled stays compiled: run piece by piece, flex attention would need far more memory."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if can_be_kept(func, args, kwargs or {}):
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(output))
        return output


def can_be_kept(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call is attention, forward, and gives the same when it is made again."""
    return is_attention(operator) and not _draws(operator, args, kwargs)


@cache
def is_attention(operator: Any) -> bool:
    """Whether an operator computes attention forward and returns it, instead of writing into an argument."""
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    name = operator._schema.name.rpartition("::")[2]
    returns = bool(operator._schema.returns) and not operator._schema.is_mutable
    return returns and ATTENTION.search(name) is not None and BACKWARD.search(name) is None


def _draws(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    found = _dropout_argument(operator)
    if found is None:
        return False
    at, name = found
    return bool(kwargs[name] if name in kwargs else args[at] if at < len(args) else 0.0)


@cache
def _dropout_argument(operator: Any) -> tuple[int, str] | None:
    named = ((at, argument.name) for at, argument in enumerate(operator._schema.arguments))
    return next(((at, name) for at, name in named if name in DROPOUTS), None)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    yield from (part for part in (output if isinstance(output, list | tuple) else (output,)) if _is_tensor(part))


def _is_tensor(part: object) -> bool:
    return isinstance(part, torch.Tensor)
