"""MXFP4: what the bytes mean, against transformers bit for bit, and how close packing comes."""

from __future__ import annotations

import pytest
import torch
from pegbox_kernels.mxfp4 import PackedMxfp4, dequantize, reference


def packed(*shape: int, seed: int = 0, low: int = 0, high: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes: blocks (*shape, 16), and scales from `low` to below `high`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(low, high, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unpacking_equals_transformers_bit_for_bit_over_every_byte_and_every_scale(dtype, device, poison) -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16)
    theirs = mxfp4.convert_moe_packed_tensors(blocks[None].clone(), scales[None].clone(), dtype=dtype)
    with poison():
        ours = dequantize(blocks.to(device)[None], scales.to(device)[None], dtype)
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    found, expected = ours.transpose(1, 2).cpu(), theirs
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.contiguous().view(bits)[~nan], expected.contiguous().view(bits)[~nan])


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 7, 3), (129,), (0, 4)])
def test_the_kernel_equals_the_reference_in_every_shape(shape, device, poison) -> None:
    blocks, scales = (tensor.to(device) for tensor in packed(*shape))
    with poison():
        found = dequantize(blocks, scales)
    assert torch.equal(found, reference.dequantize(blocks, scales, torch.bfloat16))
    assert found.shape == (*shape[:-1], shape[-1] * 32)


def test_strided_blocks_and_scales_are_read_where_they_lie(device) -> None:
    blocks, scales = (tensor.to(device) for tensor in packed(4, 6))
    found = dequantize(blocks[::2, 1:], scales[::2, 1:])
    assert torch.equal(found, reference.dequantize(blocks, scales, torch.bfloat16)[::2, 32:])


def test_packing_takes_the_nearest_number_and_the_even_one_of_two() -> None:
    row = torch.zeros(32)
    row[:16] = torch.tensor([0.2, 0.25, 0.3, 0.7, 0.75, 1.25, 1.3, 1.75, 2.5, 2.6, 3.5, 4.9, 5.0, 5.1, 7.9, -4.5])
    expected = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 3.0, 4.0, 4.0, 4.0, 6.0, 6.0, -4.0]
    found = PackedMxfp4.quantize(row).dequantize(torch.float32)
    assert found[:16].tolist() == expected


def test_what_was_packed_once_is_packed_without_loss() -> None:
    once = PackedMxfp4(*packed(5, 7, low=90, high=160))
    values = once.dequantize(torch.float32)
    again = PackedMxfp4.quantize(values).dequantize(torch.float32)
    assert torch.equal(again, values)


def test_packing_loses_at_most_half_of_the_largest_power_of_two_in_a_block_and_an_eighth_on_average() -> None:
    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    lost = (PackedMxfp4.quantize(values).dequantize(torch.float32) - values).abs()
    largest = values.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert (lost.unflatten(-1, (-1, 32)).amax(-1) <= 0.5 * torch.exp2(largest.log2().floor())).all()
    assert lost.mean() / values.abs().mean() < 0.125


def test_zeros_and_the_smallest_numbers_pack_to_what_they_are() -> None:
    zeros = PackedMxfp4.quantize(torch.zeros(2, 64))
    assert torch.equal(zeros.dequantize(torch.float32), torch.zeros(2, 64))
    tiny = torch.full((1, 32), 2.0**-126)
    assert torch.equal(PackedMxfp4.quantize(tiny).dequantize(torch.float32), tiny)


def test_a_packed_tensor_knows_its_shape_and_its_bytes() -> None:
    found = PackedMxfp4(*packed(3, 8, 2))
    assert found.shape == (3, 8, 64)
    assert found.packed_bytes == 3 * 8 * 2 * 17
    assert found.to("meta").device.type == "meta"


def test_the_operator_passes_opcheck(device) -> None:
    blocks, scales = (tensor.to(device) for tensor in packed(2, 3))
    torch.library.opcheck(torch.ops.pegbox_kernels.mxfp4_dequantize.default, (blocks, scales, torch.bfloat16))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PackedMxfp4(torch.zeros(2, 8).byte(), torch.zeros(2).byte()), "do not fit"),
        (lambda: PackedMxfp4(torch.zeros(2, 16), torch.zeros(2).byte()), "both must be uint8"),
        (lambda: PackedMxfp4.quantize(torch.zeros(2, 33)), "pad the last dimension"),
        (lambda: dequantize(*packed(2), torch.float64), "dtype is torch.float64"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
