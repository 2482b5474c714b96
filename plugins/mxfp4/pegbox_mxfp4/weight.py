"""A stacked weight of experts that is kept in MXFP4.

To the outside it is a parameter (E, in, out) or (E, out, in) in floating point; in memory, the packed bytes. It is a
tensor subclass over two tensors of bytes. An operation that knows MXFP4 takes them from `packed`; any other gets the
numbers, unpacked for this one operation. Autograd keeps the packed tensor for a backward, because unpacking lies below
it: a product with the weight of a layer unpacks it forward and again backward, and in between nothing is kept.

The weight is frozen: to write into it is an error. Moving it moves the bytes; another data type is a label, in which it
is unpacked (bfloat16 and float32 hold every number of MXFP4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pegbox.errors import RunError
from pegbox_kernels.mxfp4 import PackedMxfp4
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PACKED_BYTES_PER_NUMBER = 17 / 32
"""16 bytes of numbers and one of scale for 32 of them."""


class PackedWeight(Tensor):
    """A frozen weight (E, out, in) in MXFP4, or, if `swapped`, (E, in, out): blocks lie along `in` in both."""

    blocks: Tensor
    scales: Tensor
    swapped: bool

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, blocks: Tensor, scales: Tensor, swapped: bool, dtype: torch.dtype) -> PackedWeight:
        shape = PackedMxfp4(blocks, scales).shape
        made: PackedWeight = Tensor._make_wrapper_subclass(
            cls,
            torch.Size((*shape[:-2], shape[-1], shape[-2])) if swapped else shape,
            dtype=dtype,
            device=blocks.device,
        )
        made.blocks, made.scales, made.swapped = blocks, scales, swapped
        return made

    @classmethod
    def quantize(cls, values: Tensor, swapped: bool) -> PackedWeight:
        """Pack a weight (E, out, in), or (E, in, out) if `swapped`, an expert at a time."""
        experts = [PackedMxfp4.quantize(value.t() if swapped else value) for value in values]
        blocks, scales = (torch.stack([getattr(expert, part) for expert in experts]) for part in ("blocks", "scales"))
        return cls(blocks, scales, swapped, values.dtype)

    @property
    def packed(self) -> PackedMxfp4:
        """(E, out, in) as operations take it that know the format."""
        return PackedMxfp4(self.blocks, self.scales)

    @property
    def packed_bytes(self) -> int:
        return self.packed.packed_bytes

    def unpacked(self) -> Tensor:
        """The numbers, in the shape and data type that this weight shows."""
        return self._unpack(self.blocks, self.scales)

    def _unpack(self, blocks: Tensor, scales: Tensor) -> Tensor:
        found = PackedMxfp4(blocks, scales).dequantize(self.dtype)
        return found.transpose(-2, -1) if self.swapped else found

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        return PackedWeight(change(self.blocks), change(self.scales), self.swapped, dtype or self.dtype)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PackedWeight({tuple(self.shape)}, {self.dtype}, device={self.device}, {self.packed_bytes} bytes)"

    def __tensor_flatten__(self) -> tuple[list[str], tuple[bool, torch.dtype]]:
        return ["blocks", "scales"], (self.swapped, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[bool, torch.dtype], size: Sequence[int], stride: Sequence[int]
    ) -> PackedWeight:
        return PackedWeight(inner["blocks"], inner["scales"], *context)

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(function)
        if handler is not None and isinstance(args[0], PackedWeight):
            handled = handler(*args, **kwargs)
            if isinstance(handled, PackedWeight) and function in VIEWS:
                return return_and_correct_aliasing(function, args, kwargs, handled)
            if handled is not None:
                return handled
        _require_reading(function, args, kwargs)
        plain_args, plain_kwargs = tree_map_only(PackedWeight, PackedWeight.unpacked, (args, kwargs))
        return function(*plain_args, **plain_kwargs)


def _require_reading(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if the operation writes into a packed weight."""
    named = dict(zip((argument.name for argument in function._schema.arguments), args, strict=False)) | kwargs
    for argument in function._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes and isinstance(named.get(argument.name), PackedWeight):
            raise RunError(
                f"{function} writes into a weight that is kept in MXFP4",
                "Packed weights are frozen: an update smaller than their steps would be lost.",
                "Remove mxfp4 from plugins, or what trains, merges or initialises these weights.",
            )


def _move(weight: PackedWeight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> PackedWeight | None:
    if dtype is not None and not dtype.is_floating_point:
        return None
    placed = {name: kwargs[name] for name in ("device", "non_blocking") if kwargs.get(name) is not None}
    return weight._with(lambda inner: inner.to(**placed) if placed else inner.clone(), dtype)


def _transpose(weight: PackedWeight, first: int, second: int) -> PackedWeight | None:
    if {first % weight.ndim, second % weight.ndim} != {1, 2}:
        return None
    return PackedWeight(weight.blocks, weight.scales, not weight.swapped, weight.dtype)


def _select(weight: PackedWeight, dimension: int, index: int) -> Tensor | None:
    """One expert: the others stay packed."""
    return weight._unpack(weight.blocks[index], weight.scales[index]) if dimension % weight.ndim == 0 else None


def _index(weight: PackedWeight, indices: Sequence[Tensor | None]) -> Tensor | None:
    if len(indices) != 1 or indices[0] is None:
        return None
    return weight._unpack(weight.blocks[indices[0]], weight.scales[indices[0]])


HANDLERS: dict[Any, Callable[..., Tensor | None]] = {
    aten.detach.default: lambda weight: weight._with(torch.Tensor.detach),
    aten.alias.default: lambda weight: weight._with(torch.Tensor.detach),
    aten.clone.default: lambda weight, **_: weight._with(torch.Tensor.clone),
    aten._to_copy.default: _move,
    aten.transpose.int: _transpose,
    aten.select.int: _select,
    aten.index.Tensor: _index,
}
"""Operations that leave the weight packed, or unpack a part of it; None: not with these arguments."""
VIEWS = {aten.detach.default, aten.alias.default, aten.transpose.int}
