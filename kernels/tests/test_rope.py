"""Rotary embeddings as models apply them, their gradients, and what autograd and compile make of them.

Agreement with the reference over shapes, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from pegbox_kernels import dispatch
from pegbox_kernels.rope import kernels, reference, rope

HALVES, PAIRS = {}, {"interleaved": True}


def inputs(rows: int = 2, tokens: int = 5, dim: int = 16, dtype: torch.dtype = torch.float32):
    """q and k as a projection leaves them, and the angles of their positions."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(rows, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2) for heads in (4, 2))
    inverse = 100.0 ** -(torch.arange(0, dim, 2) / dim)
    return q, k, (torch.arange(tokens)[:, None] * inverse)[None]


def on(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(device) for tensor in tensors]


@pytest.mark.parametrize(
    ("module", "tables", "said"),
    [
        ("llama", lambda a: torch.cat((a, a), -1), HALVES),
        ("gpt_oss", lambda a: a, HALVES),
        ("cohere", lambda a: a.repeat_interleave(2, -1), PAIRS),
        ("glm", lambda a: torch.cat((a[..., :4], a[..., :4]), -1), {"rotary_dim": 8, **PAIRS, "halves": True}),
        ("phi3", lambda a: torch.cat((a[..., :4], a[..., :4]), -1), {"rotary_dim": 8}),
    ],
)
def test_it_is_that_of_transformers(module: str, tables, said: dict, device) -> None:
    pytest.importorskip("transformers")
    import importlib

    theirs = importlib.import_module(f"transformers.models.{module}.modeling_{module}").apply_rotary_pos_emb
    q, k, angles = inputs()
    q, k, cos, sin = on(device, q, k, tables(angles).cos(), tables(angles).sin())
    expected = theirs(q, k, cos, sin)
    # GLM repeats the first half of the tables for neighbours: one number for each pair.
    width = slice(0, 4) if said.get("halves") else slice(None)
    said = {name: value for name, value in said.items() if name != "halves"}
    found = rope(q, k, cos[..., width], sin[..., width], **said)
    torch.testing.assert_close(found, tuple(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("said", [HALVES, PAIRS])
def test_scores_depend_on_the_distance_of_positions_alone(said: dict, device) -> None:
    """What the embedding is for: (R_m q) . (R_n k) is a function of n - m."""
    q, k, angles = inputs(rows=1, tokens=9)
    q, k = q[:, :2, :1].expand(-1, -1, 9, -1), k[:, :, :1].expand(-1, -1, 9, -1)
    q, k = rope(*on(device, q, k, angles.cos(), angles.sin()), **said)
    scores = (q @ k.mT).cpu()
    for distance in range(-8, 9):
        same = scores.diagonal(distance, -2, -1)
        torch.testing.assert_close(same, same[..., :1].expand_as(same), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("said", [HALVES, PAIRS])
def test_the_gradient_of_unscaled_tables_turns_back(said: dict, device) -> None:
    q, k, angles = inputs()
    q, k, cos, sin = on(device, q, k, angles.cos(), angles.sin())
    q.requires_grad_(), k.requires_grad_()
    turned = rope(q, k, cos, sin, **said)
    back = torch.autograd.grad(turned, (q, k), turned)
    torch.testing.assert_close(back, (q, k), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_transposed_map_is_the_transposed_matrix(interleaved: bool) -> None:
    """In fp64, with other angles for both of a pair: no inverse would do."""
    generator = torch.Generator().manual_seed(2)
    cos, sin = (torch.randn(1, 1, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    identity = torch.eye(8, dtype=torch.float64)[:, None, None]

    def matrix(transposed: bool) -> torch.Tensor:
        return reference.rope(identity, identity, cos, sin, 6, interleaved, 1, transposed)[0].view(8, 8)

    torch.testing.assert_close(matrix(True), matrix(False).T, rtol=0, atol=0)
    assert not torch.allclose(matrix(True) @ matrix(False), torch.eye(8, dtype=torch.float64))


def test_it_can_be_differentiated_twice(device) -> None:
    q, k, angles = inputs(rows=1, tokens=2, dim=4)
    cos, sin = on(device, angles.cos(), angles.sin())
    q, k = on(device, q, k)
    q.requires_grad_()
    (first,) = torch.autograd.grad(rope(q, k, cos, sin)[0].pow(3).sum(), (q,), create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), (q,))
    expected_first, expected_second = torch.zeros_like(q), torch.zeros_like(q)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return reference.rope(x, k, cos, sin)[0].pow(3).sum()

    leaf = q.detach().requires_grad_()
    (expected_first,) = torch.autograd.grad(plain(leaf), (leaf,), create_graph=True)
    (expected_second,) = torch.autograd.grad(expected_first.sum(), (leaf,))
    torch.testing.assert_close((first, second), (expected_first, expected_second), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("said", [HALVES, PAIRS, {"rotary_dim": 6}, {"rotary_dim": 6, "interleaved": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_result_is_written(said: dict, dtype: torch.dtype, device, poison) -> None:
    q, k, angles = inputs(dtype=dtype)
    width = said.get("rotary_dim", 16) // 2
    q, k, cos, sin = on(device, q, k, angles[..., :width].cos(), angles[..., :width].sin())
    q.requires_grad_(), k.requires_grad_()
    with poison():
        turned = rope(q, k, cos, sin, **said)
        found = torch.autograd.grad(turned, (q, k), turned)
    for tensor in (*turned, *found):
        assert not tensor.isnan().any()


@pytest.mark.parametrize("said", [HALVES, PAIRS, {"rotary_dim": 6}])
def test_in_place_it_is_the_same_in_the_same_memory(said: dict, device) -> None:
    q, k, angles = inputs()
    width = said.get("rotary_dim", 16) // 2
    q, k, cos, sin = on(device, q, k, angles[..., :width].cos(), angles[..., :width].sin())
    expected = rope(q, k, cos, sin, **said)
    places = q.data_ptr(), k.data_ptr()
    found = rope(q, k, cos, sin, inplace=True, **said)
    assert (found[0].data_ptr(), found[1].data_ptr()) == places
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_results_lie_in_memory_as_the_projections_did(device) -> None:
    """Attention and the output projection then need no copy."""
    q, k, angles = inputs()
    turned = rope(*on(device, q, k, angles.cos(), angles.sin()))
    assert [part.transpose(1, 2).is_contiguous() for part in turned] == [True, True]


@pytest.mark.parametrize("transposed", [False, True])
def test_the_operator_passes_opcheck(transposed: bool, device) -> None:
    q, k, angles = inputs(dtype=torch.bfloat16)
    q, k, cos, sin = on(device, q, k, angles.cos(), angles.sin())
    q.requires_grad_()
    torch.library.opcheck(torch.ops.pegbox_kernels.rope.default, (q, k, cos, sin, 16, False, 1, transposed))
    torch.library.opcheck(torch.ops.pegbox_kernels.rope_.default, (q.detach().clone(), k, cos, sin, 16, True, 1))


def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(device) -> None:
    q, k, angles = inputs()
    q, k, cos, sin = on(device, q, k, angles.cos(), angles.sin())
    q.requires_grad_(), k.requires_grad_()

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        first, second = rope(q * 2, k, cos, sin)
        return first.pow(3).sum() + second.pow(2).sum()

    expected = torch.autograd.grad(loss(q, k), (q, k))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), (q, k)), expected)


@pytest.mark.parametrize("said", [HALVES, PAIRS])
def test_without_triton_the_reference_answers(said: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    import pegbox_kernels.rope as op

    assert kernels is not None
    q, k, angles = inputs()
    results = []
    for uses_kernels in (True, False):
        monkeypatch.setattr(op, "runs_kernels", dispatch.runs_kernels if uses_kernels else lambda _: False)
        leaf = q.clone().requires_grad_()
        turned = rope(leaf, k, angles.cos(), angles.sin(), **said)
        results.append((*turned, *torch.autograd.grad(turned[0].pow(3).sum(), (leaf,))))
    assert results[0][0].stride() == results[1][0].stride()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 2, 4, 16)}, r"k \(2, 2, 4, 16\).* may differ in their heads only, dimension 1"),
        ({"q": torch.ones(2, 5, 16)}, "q and k have four dimensions"),
        ({"cos": torch.ones(1, 5, 4), "sin": torch.ones(1, 5, 4)}, "tables are 16 or 8 wide; .* pass rotary_dim"),
        ({"cos": torch.ones(1, 6, 8), "sin": torch.ones(1, 6, 8)}, "the tables need one row or 2, and 5 tokens"),
        ({"cos": torch.ones(1, 5, 8), "sin": torch.ones(1, 5, 16)}, "cos and sin three and the same shape"),
        ({"rotary_dim": 7}, "rotary_dim is 7: an even number from 2 to 16"),
        ({"heads_dim": 3}, "heads_dim is 3"),
        ({"q": torch.ones(2, 4, 5, 16).double()}, "q is torch.float64"),
        ({"cos": torch.ones(1, 5, 8, requires_grad=True)}, "cos or sin needs a gradient"),
        ({"q": torch.ones(2, 4, 5, 16, requires_grad=True), "inplace": True}, "q or k needs a gradient"),
        ({"k": torch.ones(2, 2, 5, 16, device="meta")}, "q lies on cpu and k on meta"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    q, k, angles = inputs()
    with pytest.raises(ValueError, match=message):
        rope(**{"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin(), **change})
