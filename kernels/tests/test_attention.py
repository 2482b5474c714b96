"""Attention with sinks: whose numbers they are, that documents do not meet, edges, layouts, autograd and compile.

Agreement with the reference over shapes, windows, groups, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pegbox_kernels.attention import Attended, attention, block_table, kernels, reference
from pegbox_kernels.attention.spec import pairs
from pegbox_kernels.harness.parity import error
from torch import Tensor


def tensors(tokens: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, dtype=torch.float32, seed: int = 0):
    """q, k, v and sinks."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim), (heads,))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def borders(*lengths: int, device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def with_gradients(given: list[Tensor], **options) -> tuple[Attended, tuple[Tensor, ...]]:
    """Both outputs, and the gradients of q, k, v and sinks for fixed weights of the outputs."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given]
    found = attention(*leaves[:3], sinks_H=leaves[3], **options)
    weights = torch.linspace(-1, 1, found.out_THD.numel(), device=found.out_THD.device).view_as(found.out_THD)
    total = (found.out_THD.float() * weights).sum() + 0.1 * found.lse_HT.square().sum()
    return found, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("window", [None, 16])
def test_the_reference_is_the_eager_attention_of_transformers_gpt_oss(window: int | None) -> None:
    """To the edge of its window, whose mask transformers itself makes."""
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    from transformers import GptOssConfig
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    tokens = 40
    q, k, v, sinks = (tensor.double() for tensor in tensors(tokens))
    config = GptOssConfig(sliding_window=window or 128, attn_implementation="eager")
    make = create_causal_mask if window is None else create_sliding_window_causal_mask
    mask = make(
        config=config,
        inputs_embeds=torch.zeros(1, tokens, 1, dtype=torch.float64),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(tokens)[None],
    )
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    heads_first = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    expected, _ = modeling.eager_attention_forward(module, *heads_first, mask, scaling=32**-0.5)
    found, _ = reference.attention(q, k, v, sinks, None, 32**-0.5, True, window)
    torch.testing.assert_close(found, expected[0], rtol=1e-6, atol=1e-6)


def test_the_reference_passes_gradcheck_and_its_formula_is_its_gradient() -> None:
    q, k, v, sinks = (tensor.double() for tensor in tensors(9, head_dim=3))
    cu_seqlens = borders(4, 0, 5, device=torch.device("cpu"))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v, sinks)]
    for causal, window in ((True, None), (True, 2), (False, None)):

        def outputs(*inputs: Tensor, causal: bool = causal, window: int | None = window) -> tuple[Tensor, Tensor]:
            return reference.attention(*inputs, cu_seqlens, 0.7, causal, window)

        assert torch.autograd.gradcheck(outputs, leaves)
        out, lse = outputs(*leaves)
        grads = torch.randn_like(out), torch.randn_like(lse)
        expected = torch.autograd.grad((out, lse), leaves, grads)
        with torch.no_grad():
            found = reference.attention_backward(*leaves, cu_seqlens, out, lse, *grads, 0.7, causal, window)
        torch.testing.assert_close(found, expected)


def test_the_gradient_of_a_sink_is_the_finite_difference_of_the_outputs(device) -> None:
    """Of the reference in fp64, without autograd; the kernels in fp32 give the same."""
    given = tensors(20)
    weights = torch.randn(20, 4, 32, generator=torch.Generator().manual_seed(3)).double()
    q, k, v, sinks = (tensor.double() for tensor in given)
    slopes = []
    for head in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[head] = 1e-5
        ends = [(reference.attention(q, k, v, sinks + s, None, 0.2, True, 7)[0] * weights).sum() for s in (step, -step)]
        slopes.append((ends[0] - ends[1]) / 2e-5)
    leaf = given[3].to(device).requires_grad_()
    found = attention(*(tensor.to(device) for tensor in given[:3]), sinks_H=leaf, scale=0.2, window=7)
    (found.out_THD * weights.to(device, torch.float32)).sum().backward()
    torch.testing.assert_close(leaf.grad.cpu().double(), torch.stack(slopes), rtol=1e-4, atol=1e-5)


LENGTHS = (70, 1, 0, 190, 33)


@pytest.mark.parametrize(
    "options", [{}, {"window": 128}, {"window": 20}, {"deterministic": True}], ids=["", "128", "20", "deterministic"]
)
def test_a_document_has_the_same_bits_alone_and_in_a_packed_batch(options: dict, device) -> None:
    given = [tensor.to(device) for tensor in tensors(sum(LENGTHS), 2, 1, 64, torch.bfloat16)]
    packed, grads = with_gradients_of_one(given, 2, cu_seqlens_S=borders(*LENGTHS, device=device), **options)
    begin = sum(LENGTHS[:3])
    rows = slice(begin, begin + LENGTHS[3])
    alone, expected = with_gradients_of_one([*(t[rows] for t in given[:3]), given[3]], 2, **options)
    assert torch.equal(packed.out_THD[rows], alone.out_THD)
    assert torch.equal(packed.lse_HT[:, rows], alone.lse_HT)
    for found, single in zip(grads, expected, strict=True):
        if device.type == "cpu" or options:
            assert torch.equal(found[rows], single)
        else:
            torch.testing.assert_close(found[rows], single, rtol=0.02, atol=0.02)


def with_gradients_of_one(given: list[Tensor], power: int, **options) -> tuple[Attended, tuple[Tensor, ...]]:
    """As with_gradients, with weights that are functions of the outputs, so that they do not know where a row lies."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:3]]
    found = attention(*leaves, sinks_H=given[3], **options)
    total = found.out_THD.float().pow(power).sum() + found.lse_HT.square().sum()
    return found, torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("window", [None, 30, 128])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e4])
def test_nothing_of_a_document_reaches_another(window: int | None, bad: float, device) -> None:
    lengths = (50, 90, 60)
    given = [tensor.to(device) for tensor in tensors(200, 2, 1, 64, torch.bfloat16)]
    cu_seqlens = borders(*lengths, device=device)
    options = {"cu_seqlens_S": cu_seqlens, "window": window, "deterministic": True}
    clean, clean_grads = with_gradients(given, **options)
    for tensor in given[:3]:
        tensor[50:140] = bad
    dirty, dirty_grads = with_gradients(given, **options)
    for rows in (slice(0, 50), slice(140, 200)):
        assert torch.equal(clean.out_THD[rows], dirty.out_THD[rows])
        assert torch.equal(clean.lse_HT[:, rows], dirty.lse_HT[:, rows])
        for before, after in zip(clean_grads[:3], dirty_grads[:3], strict=True):
            assert torch.equal(before[rows], after[rows])
    assert not torch.equal(clean.out_THD[50:140], dirty.out_THD[50:140])


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 127, 128, 129, 130])
def test_a_token_sees_itself_and_the_window_less_one_before_it(window: int, device) -> None:
    """Values are one-hot in a chosen token: an output is above zero exactly where that token is seen."""
    tokens, chosen = 300, 70
    q, k = (torch.zeros(tokens, 1, 16, device=device, dtype=torch.bfloat16) for _ in range(2))
    v = torch.zeros_like(k)
    v[chosen] = 1.0
    v.requires_grad_()
    out = attention(q, k, v, window=window).out_THD
    seen = torch.arange(tokens, device=device)
    expected = (seen >= chosen) & (seen < chosen + window)
    assert torch.equal(out[:, 0, 0] > 0, expected)
    (grad,) = torch.autograd.grad(out[chosen + window - 1].sum(), (v,))
    assert grad[chosen].abs().min() > 0
    assert grad[:chosen].abs().max() == 0
    assert grad[chosen + window :].abs().max() == 0


def test_a_sink_takes_all_or_nothing_at_its_extremes(device) -> None:
    q, k, v, _ = (tensor.to(device) for tensor in tensors(40))
    without = attention(q, k, v)
    sinks = torch.tensor([-math.inf, -1e4, 1e4, 0.0], device=device, requires_grad=True)
    found = attention(q, k, v, sinks_H=sinks)
    torch.testing.assert_close(found.out_THD[:, :2], without.out_THD[:, :2])
    torch.testing.assert_close(found.lse_HT[:2], without.lse_HT[:2])
    assert torch.equal(found.out_THD[:, 2], torch.zeros_like(found.out_THD[:, 2]))
    torch.testing.assert_close(found.lse_HT[2], torch.full_like(found.lse_HT[2], 1e4))
    torch.testing.assert_close(found.lse_HT[3], torch.logaddexp(without.lse_HT[3], torch.zeros_like(without.lse_HT[3])))
    (grad,) = torch.autograd.grad(found.out_THD.square().sum(), (sinks,))
    assert grad[:3].tolist() == [0.0, 0.0, 0.0]
    assert grad[3] < 0


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"deterministic": True}, {"causal": False}])
def test_every_element_of_every_result_is_written(options: dict, device, poison) -> None:
    given = [tensor.to(device) for tensor in tensors(210, 2, 1, 64, torch.bfloat16)]
    with poison():
        assert torch.empty(3, device=device).isnan().all()
        cu_seqlens = borders(3, 0, 137, 70, device=device)
        found, grads = with_gradients(given, cu_seqlens_S=cu_seqlens, **options)
    for tensor in (*found, *grads):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("window", [None, 128, 200])
def test_deterministic_gives_the_same_bits_again(window: int | None, device) -> None:
    given = [tensor.to(device) for tensor in tensors(300, 4, 1, 64, torch.bfloat16)]
    first, second = (with_gradients(given, window=window, deterministic=True) for _ in range(2))
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [None, 100])
def test_no_tokens_give_no_outputs_and_no_gradient_for_sinks(window: int | None, device) -> None:
    given = [tensor.to(device) for tensor in tensors(0)]
    for cu_seqlens in (None, borders(device=device), borders(0, 0, device=device)):
        found, grads = with_gradients(given, cu_seqlens_S=cu_seqlens, window=window)
        assert found.out_THD.shape == (0, 4, 32)
        assert found.lse_HT.shape == (4, 0)
        assert torch.equal(grads[3], torch.zeros(4, device=device))


def test_a_block_table_shared_by_layers_changes_nothing(device) -> None:
    given = [tensor.to(device) for tensor in tensors(sum(LENGTHS), 2, 1, 64, torch.bfloat16)]
    cu_seqlens = borders(*LENGTHS, device=device)
    plan = block_table(cu_seqlens, sum(LENGTHS))
    for window in (None, 100):
        expected = with_gradients(given, cu_seqlens_S=cu_seqlens, window=window, deterministic=True)
        found = with_gradients(given, cu_seqlens_S=plan, window=window, deterministic=True)
        for one, other in zip((*expected[0], *expected[1][:3]), (*found[0], *found[1][:3]), strict=True):
            assert torch.equal(one, other)
        # A sum over blocks, whose order the table changes.
        torch.testing.assert_close(found[1][3], expected[1][3])
    with pytest.raises(ValueError, match="the block table is for 294 tokens, q has 100"):
        attention(*(tensor[:100] for tensor in given[:3]), cu_seqlens_S=plan)


def test_the_block_table_holds_every_token_once_whatever_the_borders(device) -> None:
    if kernels is None:
        pytest.skip("needs triton")
    generator = torch.Generator().manual_seed(0)
    for documents in (1, 2, 7, 200):
        lengths = torch.randint(0, 600, (documents,), generator=generator).tolist()
        tokens = sum(lengths)
        table = block_table(borders(*lengths, device=device), tokens).rows.cpu()
        for order in table:
            covered = torch.zeros(tokens, dtype=torch.int32)
            for start, begin, end, _ in order.tolist():
                assert start >= end or begin <= start
                covered[start : min(start + kernels.GRANULE, end)] += 1
            assert torch.equal(covered, torch.ones_like(covered))


@pytest.mark.parametrize("distance", [2**31 // 260 - 4, 2**31 // 200])
def test_tokens_may_lie_so_far_apart_that_offsets_need_64_bits(distance: int, device) -> None:
    """In place where a tile of them fits 32 bits, else by a copy."""
    q, k, v, _ = tensors(280, 1, 1, 16, torch.bfloat16)
    room = torch.empty(distance * 279 + 16, dtype=q.dtype, device=device)
    apart = room.as_strided(q.shape, (distance, 16, 1)).copy_(q).requires_grad_()
    together = q.to(device).requires_grad_()
    results = []
    for queries in (apart, together):
        out = attention(queries, k.to(device), v.to(device), window=40).out_THD
        results.append((out, *torch.autograd.grad(out.float().square().sum(), (queries,))))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_frozen_inputs_cost_no_gradient_and_keep_the_others(device) -> None:
    given = [tensor.to(device) for tensor in tensors(60)]
    _, expected = with_gradients(given)
    leaves = [tensor.clone().requires_grad_(i != 3) for i, tensor in enumerate(given)]
    found = attention(*leaves[:3], sinks_H=leaves[3])
    weights = torch.linspace(-1, 1, found.out_THD.numel(), device=device).view_as(found.out_THD)
    total = (found.out_THD * weights).sum() + 0.1 * found.lse_HT.square().sum()
    grads = torch.autograd.grad(total, leaves[:3])
    for one, other in zip(grads, expected, strict=False):
        torch.testing.assert_close(one, other)


def test_every_way_backward_agrees_with_every_launch(device) -> None:
    """Both ways and each layout of scores, in fp32 on small tiles; short windows have their own tests."""
    if kernels is None:
        pytest.skip("needs triton")
    from pegbox_kernels.attention.launch import Launch, Saved, Tile

    lengths, heads = (40, 0, 150), 2
    q, k, v, sinks = (tensor.to(device) for tensor in tensors(190, heads, 1, 16))
    cu_seqlens = borders(*lengths, device=device)
    table = kernels.make_table(cu_seqlens, 190)
    for window in (None, 120):
        shape = kernels.Shape(
            tokens=190, heads=heads, kv_heads=1, head_dim=16, dtype=q.dtype, scale=0.25, causal=True, window=window
        )
        out, lse = reference.attention(q, k, v, sinks, cu_seqlens, 0.25, True, window)
        dout, dlse = torch.ones_like(out) * out.sign(), torch.ones_like(lse)
        arguments = (q, k, v, sinks, cu_seqlens, out, lse, dout, dlse)
        expected = reference.attention_backward(*arguments, 0.25, True, window)
        saved = Saved(q=q, k=k, v=v, sinks=sinks, out=out, lse=lse, dout=dout, dlse=dlse, table=table)
        for way, flags in (
            ("atomic", (False, False)),
            ("atomic", (False, True)),
            ("ordered", (True, False)),
            ("ordered", (True, True)),
        ):
            tile = Tile(64, 1, 128, 4, 1, *flags)
            forward = Tile(64, 2, 64, 4, 1, flags[0])
            launch = Launch(forward=forward, queries=forward, keys=tile, way=way)
            for found, right in zip(kernels.backward(saved, shape, launch), expected, strict=True):
                assert error(found, right) < 2e-5 * max(1.0, right.abs().max().item()), (way, window, flags)
            values = kernels.forward(q, k, v, sinks, table, shape, launch)
            torch.testing.assert_close(values, (out, lse), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 16, 2), (64, 3, 1), (128, 6, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_forward_of_hopper_is_as_exact_as_that_of_every_gpu(causal, head_dim, heads, kv_heads, dtype) -> None:
    tokens, generator = 777, torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(tokens, count, head_dim, device="cuda", generator=generator).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    sinks = torch.randn(heads, device="cuda", generator=generator)
    shape = kernels.Shape(
        tokens=tokens,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        scale=head_dim**-0.5,
        causal=causal,
        window=None,
    )
    launch = kernels.default_launch(shape, True)
    truth = reference.attention(q.double(), k.double(), v.double(), sinks.double(), None, shape.scale, causal, None)
    crews = {False: None, True: kernels.CREWS[head_dim]}
    errors = {
        of_hopper: [
            error(found, right)
            for found, right in zip(
                kernels.forward(q, k, v, sinks, None, shape, replace(launch, crew=crew)), truth, strict=True
            )
        ]
        for of_hopper, crew in crews.items()
    }
    assert all(ours <= 2 * other + 1e-6 for ours, other in zip(errors[True], errors[False], strict=True))


def test_sinks_may_lie_apart(device) -> None:
    q, k, v, sinks = (tensor.to(device) for tensor in tensors(40))
    apart = torch.stack((sinks, sinks + 9), 1)[:, 0]
    assert apart.stride() != sinks.stride()
    torch.testing.assert_close(attention(q, k, v, sinks_H=apart), attention(q, k, v, sinks_H=sinks), rtol=0, atol=0)


def test_without_triton_the_reference_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import pegbox_kernels.attention as op

    given = tensors(60)
    cu_seqlens = borders(25, 35, device=torch.device("cpu"))
    results = []
    for runs in (op.runs_kernels, lambda _: False):
        monkeypatch.setattr(op, "runs_kernels", runs)
        found, grads = with_gradients(given, cu_seqlens_S=cu_seqlens, window=9)
        results.append((*found, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_second_derivative_is_refused(device) -> None:
    q, k, v, _ = (tensor.to(device).requires_grad_() for tensor in tensors(10))
    (grad,) = torch.autograd.grad(attention(q, k, v).out_THD.square().sum(), (q,), create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_the_operator_passes_opcheck(device) -> None:
    q, k, v, sinks = (tensor.to(device).requires_grad_() for tensor in tensors(12, head_dim=16))
    cu_seqlens = borders(5, 7, device=device)
    operators = torch.ops.pegbox_kernels
    torch.library.opcheck(operators.attention_table.default, (cu_seqlens, 12))
    table = operators.attention_table(cu_seqlens, 12)
    options = (0.25, True, 5, True)
    torch.library.opcheck(operators.attention.default, (q, k, v, sinks, cu_seqlens, table, *options))
    out, lse = (tensor.detach() for tensor in operators.attention(q, k, v, sinks, cu_seqlens, table, *options))
    leaves = tuple(tensor.detach() for tensor in (q, k, v, sinks))
    saved = (*leaves, cu_seqlens, table, out, lse, torch.ones_like(out), None, True, *options)
    torch.library.opcheck(operators.attention_backward.default, saved)


def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(device) -> None:
    q, k, v, sinks = (tensor.to(device) for tensor in tensors(30))
    cu_seqlens = borders(12, 18, device=device)
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        found = attention(q @ weight, k, v, sinks_H=sinks, cu_seqlens_S=cu_seqlens, window=6)
        return found.out_THD.square().sum() + found.lse_HT.sum()

    expected = torch.autograd.grad(loss(weight), (weight,))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(weight), (weight,)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_TKD": torch.zeros(6, 3, 32)}, r"k \(6, 3, 32\), v \(6, 2, 32\) do not fit"),
        ({"q_THD": torch.zeros(6, 3, 32), "sinks_H": None}, "3 query heads must be a multiple of the 2 key heads"),
        ({"q_THD": torch.zeros(6, 4, 32, dtype=torch.bfloat16)}, "q is torch.bfloat16, k torch.float32"),
        ({"sinks_H": torch.zeros(2)}, r"sinks are \(2,\) .* one float per query head, \(4,\)"),
        ({"window": 0}, "window is 0"),
        ({"window": 3, "causal": False}, "window=3 with causal=False"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"cu_seqlens_S": torch.tensor([0, 6])}, r"cu_seqlens are \(2,\) torch.int64: .* int32"),
        ({"cu_seqlens_S": torch.tensor([0, 5], dtype=torch.int32)}, r"\[0, 5\]: they must rise from 0 to .* 6"),
        ({"cu_seqlens_S": torch.tensor([0, 4, 2, 6], dtype=torch.int32)}, "must rise"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict, message: str) -> None:
    q, k, v, sinks = tensors(6)
    with pytest.raises(ValueError, match=message):
        attention(**{"q_THD": q, "k_TKD": k, "v_TKD": v, "sinks_H": sinks, **change})


def test_pairs_of_tokens_are_counted_exactly() -> None:
    for lengths in ((5,), (1, 7, 3)):
        for window in (None, 1, 3, 9):
            seen = sum(int(reference.visible(n, True, window, torch.device("cpu")).sum()) for n in lengths)
            assert pairs(lengths, window) == seen
