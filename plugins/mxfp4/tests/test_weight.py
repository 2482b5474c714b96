"""The packed tensor: what leaves it packed, what unpacks it, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from pegbox.errors import RunError
from pegbox_kernels.mxfp4 import PackedMxfp4
from pegbox_mxfp4.weight import PACKED_BYTES_PER_NUMBER, PackedWeight
from torch import nn


def weight(swapped: bool = False) -> PackedWeight:
    """(3, 64, 32) as (E, out, in), or (3, 32, 64) as (E, in, out)."""
    torch.manual_seed(0)
    return PackedWeight.quantize(torch.randn(3, 32, 64) if swapped else torch.randn(3, 64, 32), swapped)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_numbers_are_those_of_the_format(swapped: bool) -> None:
    packed = weight(swapped)
    found = packed.packed.dequantize(torch.float32)
    assert tuple(found.shape) == (3, 64, 32)
    assert torch.equal(packed.unpacked(), found.transpose(1, 2) if swapped else found)
    assert torch.equal(packed + 0, packed.unpacked())
    assert packed.packed_bytes == packed.numel() * PACKED_BYTES_PER_NUMBER


@pytest.mark.parametrize("swapped", [False, True])
def test_packing_an_expert_at_a_time_is_packing_all(swapped: bool) -> None:
    values = torch.randn(3, 32, 64)
    at_once = PackedMxfp4.quantize(values.transpose(1, 2) if swapped else values)
    packed = PackedWeight.quantize(values, swapped)
    assert torch.equal(packed.blocks, at_once.blocks)
    assert torch.equal(packed.scales, at_once.scales)


def test_an_expert_is_unpacked_alone() -> None:
    packed = weight(swapped=True)
    assert torch.equal(packed[1], packed.unpacked()[1])
    assert torch.equal(packed[torch.tensor([2, 0, 2])], packed.unpacked()[[2, 0, 2]])


def test_a_transposed_weight_stays_packed() -> None:
    packed = weight()
    turned = packed.transpose(-2, -1)
    assert isinstance(turned, PackedWeight)
    assert torch.equal(turned.unpacked(), packed.unpacked().transpose(1, 2))
    assert not isinstance(packed.transpose(0, 1), PackedWeight)


def test_moving_moves_the_bytes_and_a_data_type_is_a_label() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(weight(), requires_grad=False)
    before = module.weight.unpacked()
    module.to(torch.bfloat16)
    assert isinstance(module.weight, PackedWeight)
    assert module.weight.dtype == torch.bfloat16
    assert torch.equal(module.weight.unpacked().float(), before)
    assert module.weight.blocks.dtype == torch.uint8
    module.to("meta")
    assert (module.weight.device.type, module.weight.blocks.device.type) == ("meta", "meta")
    assert [name for name, _ in module.named_parameters()] == ["weight"]


def test_copies_are_packed_and_their_own() -> None:
    parameter = nn.Parameter(weight(), requires_grad=False)
    for other in (copy.deepcopy(parameter), parameter.clone()):
        assert isinstance(other, PackedWeight)
        assert other.blocks.data_ptr() != parameter.blocks.data_ptr()
        assert torch.equal(other.unpacked(), parameter.unpacked())


def test_writing_into_it_is_refused() -> None:
    packed = weight()
    for write in (lambda: packed.add_(1), lambda: packed.copy_(torch.zeros(3, 64, 32)), lambda: packed.zero_()):
        with pytest.raises(RunError, match="kept in MXFP4"):
            write()
    torch.zeros(3, 64, 32).copy_(packed)


@pytest.mark.parametrize("swapped", [False, True])
def test_a_product_has_the_gradient_of_the_unpacked_one(swapped: bool) -> None:
    packed = weight(swapped)
    rows = torch.randn(3, 5, packed.shape[1], requires_grad=True)
    expected = torch.autograd.grad(torch.bmm(rows, packed.unpacked()).square().sum(), rows)
    found = torch.autograd.grad(torch.bmm(rows, packed).square().sum(), rows)
    assert torch.equal(found[0], expected[0])


def test_it_shows_what_it_is() -> None:
    assert repr(weight()) == "PackedWeight((3, 64, 32), torch.float32, device=cpu, 3264 bytes)"
