"""LoRA on frozen linear layers: what it equals, what it keeps, and what autograd, autocast and compile make of it.

Agreement with the reference over shapes, ranks and dtypes is in test_parity.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pegbox_kernels.lora_linear import Projection, glu, lora_linear, lora_linears, lora_mlp, projection, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

T, K, WIDTH = 21, 24, 40


def made(outputs: int, rank: int, inputs: int = K, dtype: torch.dtype = torch.float32, **more: Any) -> Projection:
    """A projection with random parts; bias=True gives it a bias that is trained."""
    generator = torch.Generator().manual_seed(outputs * 100 + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.5

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if more.pop("bias", False):
        more["bias"] = normal(outputs).to(wide).requires_grad_()
    if rank:
        more |= {"a": normal(rank, inputs).to(wide).requires_grad_(), "b": normal(outputs, rank).to(wide)}
        more["b"].requires_grad_()
    return Projection(weight=normal(outputs, inputs).to(dtype), **{"scale": 1.5, **more})


def group(**more: Any) -> tuple[Projection, ...]:
    return tuple(made(outputs, rank, **more) for outputs, rank in ((32, 8), (16, 3), (12, 5)))


def block(**more: Any) -> tuple[Projection, ...]:
    return made(WIDTH, 4, **more), made(WIDTH, 6, **{**more, "scale": 0.5}), made(20, 5, inputs=WIDTH, **more)


def leaves(projections: tuple[Projection, ...]) -> list[Tensor]:
    found = [tensor for part in projections for tensor in (part.a, part.b, part.bias, part.magnitude)]
    return [tensor for tensor in found if tensor is not None and tensor.requires_grad]


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7)).to(dtype).requires_grad_()


def outcome(ys: Tensor | tuple[Tensor, ...], of: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of a sum that weighs every element differently."""
    ys = (ys,) if isinstance(ys, Tensor) else tuple(ys)
    loss = sum((y.double() * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)).sum() for y in ys)
    return [*(y.detach() for y in ys), *torch.autograd.grad(loss, of)]


def peft_layer(part: Projection, **more: Any) -> torch.nn.Module:
    """PEFT's own layer with the same matrices."""
    peft = pytest.importorskip("peft")
    linear = torch.nn.Linear(*reversed(part.weight.shape), bias=part.bias is not None)
    linear.weight.data.copy_(part.weight)
    if part.bias is not None:
        linear.bias.data.copy_(part.bias.detach())
    rank = part.rank
    config = peft.LoraConfig(target_modules=["0"], r=rank, lora_alpha=part.scale * rank, **more)
    layer = peft.inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]
    layer.lora_A["default"].weight.data.copy_(part.a.detach())
    layer.lora_B["default"].weight.data.copy_(part.b.detach())
    linear.requires_grad_(False)
    if part.bias is not None:
        linear.bias.requires_grad_()
    return layer


def of_peft(layer: torch.nn.Module) -> list[Tensor]:
    bias = layer.base_layer.bias
    found = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, *([] if bias is None else [bias])]
    return found + [part.weight for part in layer.lora_magnitude_vector.values()]


@pytest.mark.parametrize("bias", [False, True])
def test_a_group_equals_layers_of_peft(bias: bool) -> None:
    x, parts = inputs(3, 7, K), group(bias=bias)
    layers = [peft_layer(part) for part in parts]
    ours = outcome(lora_linears(x, parts), [x, *leaves(parts)])
    theirs = outcome(tuple(layer(x) for layer in layers), [x, *(leaf for layer in layers for leaf in of_peft(layer))])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", ["projections", "input"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_an_mlp_equals_one_of_peft_layers(activation: str, keep: str) -> None:
    x, parts = inputs(3, 7, K), block(bias=True)
    layers = [peft_layer(part) for part in parts]
    gate, up, down = layers
    ours = outcome(lora_mlp(x, *parts, activation=activation, keep=keep), [x, *leaves(parts)])
    expected = down(reference.activate(gate(x), activation) * up(x))
    theirs = outcome(expected, [x, *(leaf for layer in layers for leaf in of_peft(layer))])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def with_magnitude(part: Projection) -> Projection:
    magnitude = part.weight.norm(dim=1).mul(1.1).requires_grad_()
    return Projection(**{**vars(part), "magnitude": magnitude})


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_dora_equals_that_of_peft(kind: str) -> None:
    x, parts = inputs(T, K), tuple(with_magnitude(part) for part in block(bias=True))
    layers = [peft_layer(part, use_dora=True) for part in parts]
    for layer, part in zip(layers, parts, strict=True):
        layer.lora_magnitude_vector["default"].weight.data.copy_(part.magnitude.detach())
    if kind == "linear":
        ours = outcome(lora_linears(x, parts[:1]), [x, *leaves(parts[:1])])
        theirs = outcome(layers[0](x), [x, *of_peft(layers[0])])
    else:
        ours = outcome(lora_mlp(x, *parts), [x, *leaves(parts)])
        y = layers[2](torch.nn.functional.silu(layers[0](x)) * layers[1](x))
        theirs = outcome(y, [x, *(leaf for layer in layers for leaf in of_peft(layer))])
    by_shape = [sorted(found[1:], key=lambda t: (t.shape, t.sum().item())) for found in (ours, theirs)]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*by_shape, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_differences() -> None:
    """In fp64, through both functions, biases and factors included."""
    x = inputs(4, 6, dtype=torch.float64)
    parts = tuple(made(5, rank, inputs=6, dtype=torch.float64, bias=True) for rank in (2, 3))
    assert torch.autograd.gradcheck(lambda *_: lora_linears(x, parts), [x, *leaves(parts)])
    for activation in reference.ACTIVATIONS:
        more = (*parts, made(3, 2, inputs=5, dtype=torch.float64, bias=True))
        assert torch.autograd.gradcheck(lambda *_: lora_mlp(x, *more, activation=activation), [x, *leaves(more)])  # noqa: B023


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_slope_written_out_is_that_of_autograd(activation: str) -> None:
    gate = torch.linspace(-20, 20, 401, dtype=torch.float64).requires_grad_()
    value, slope = reference.slope(gate, activation)
    expected = reference.activate(gate, activation)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(slope, *torch.autograd.grad(expected.sum(), gate))


@pytest.mark.parametrize("rank", [3, 40])
def test_every_element_of_every_result_is_written(rank: int, device, poison) -> None:
    x = inputs(37, K).to(device).detach().requires_grad_()
    parts = (made(70, rank), made(70, 2), made(20, rank, inputs=70))
    parts = tuple(
        Projection(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(p).items()}) for p in parts
    )
    with poison():
        assert torch.empty(3, device=device).isnan().all()
        found = outcome(lora_mlp(x, *parts).cpu(), [x])
        found += outcome(tuple(y.cpu() for y in lora_linears(x, parts[:2])), [x])
    assert not any(tensor.isnan().any() for tensor in found)


def test_sums_in_the_kernel_are_those_of_gemms_and_the_same_bits_each_time(device) -> None:
    from pegbox_kernels.lora_linear import triton as kernels

    tokens, width, ranks = 70, 150, (5, 3, 16)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    normal = [drawn(tokens, width) for _ in range(3)]
    p, dp = drawn(tokens, ranks[0] + ranks[1]), drawn(tokens, ranks[2])
    small = (p, drawn(width, ranks[0]), drawn(width, ranks[1]), dp, drawn(ranks[2], width))
    launch = kernels.Launch(16, 64, 4, chunks=2)
    results = []
    for reduce in (True, True, False):
        dh = normal[0].clone()
        rest = (*normal[1:], *small, 1.5, -0.5, "silu", True)
        results.append((dh, *kernels.backward(dh, *rest, launch=launch, reduce=reduce)))
    assert all(torch.equal(one, other) for one, other in zip(*results[:2], strict=True))
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)
    forward = (*normal[1:], *small[:3], small[4], 1.5, -0.5, "silu")
    results = [kernels.forward(*forward, launch=launch, reduce=reduce) for reduce in (True, True, False)]
    assert all(torch.equal(one, other) for one, other in zip(*results[:2], strict=True))
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", ["linears", "mlp"])
def test_under_autocast_it_computes_in_bf16_and_gradients_come_in_fp32(call: str) -> None:
    parts, x = (block if call == "mlp" else group)(), inputs(T, K)
    run = (lambda: lora_mlp(x, *parts)) if call == "mlp" else (lambda: lora_linears(x, parts))
    exact = outcome(run(), [x, *leaves(parts)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ys = run()
        ys = ys if isinstance(ys, tuple) else (ys,)
        assert {y.dtype for y in ys} == {torch.bfloat16}
        loss = sum((y.double() * torch.linspace(-1, 2, y.numel()).double().view(y.shape)).sum() for y in ys)
    gradients = torch.autograd.grad(loss, [x, *leaves(parts)])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    for found, expected in zip((*ys, *gradients), exact, strict=True):
        assert (found.float() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_changes_no_bit_also_with_dropout(reentrant: bool) -> None:
    for more in ({}, {"dropout": 0.4}):
        x, parts = inputs(T, K), block(**more)
        torch.manual_seed(3)
        kept = outcome(lora_mlp(x, *parts), [x, *leaves(parts)])
        torch.manual_seed(3)
        y = checkpoint(lambda x: lora_mlp(x, *parts), x, use_reentrant=reentrant)  # noqa: B023
        y.mul(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
        again = [y.detach(), *(leaf.grad for leaf in (x, *leaves(parts)))]
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-5)


def masks_of(seed: int, *shapes: tuple[int, int], dropout: float) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.empty(shape, dtype=torch.bool).bernoulli_(1 - dropout) / (1 - dropout) for shape in shapes]


def test_dropout_is_a_mask_of_its_own_for_each_update_and_its_gradient_that_of_these_masks() -> None:
    x, parts = inputs(T, K), group(dropout=0.3)
    torch.manual_seed(5)
    ours = outcome(lora_linears(x, parts), [x, *leaves(parts)])
    masks = masks_of(5, *[(T, K)] * 3, dropout=0.3)
    assert not torch.equal(masks[0], masks[1])
    plain = tuple(
        x @ part.weight.T + part.scale * (x * mask) @ part.a.T @ part.b.T
        for part, mask in zip(parts, masks, strict=True)
    )
    torch.testing.assert_close(ours, outcome(plain, [x, *leaves(parts)]), rtol=1e-5, atol=1e-5)


def test_dropout_in_an_mlp_reaches_all_three_updates() -> None:
    x, (gate, up, down) = inputs(T, K), block(dropout=0.3)
    torch.manual_seed(5)
    ours = outcome(lora_mlp(x, gate, up, down), [x, *leaves((gate, up, down))])
    one, two, three = masks_of(5, (T, K), (T, K), (T, WIDTH), dropout=0.3)

    def plain(x: Tensor, part: Projection, mask: Tensor) -> Tensor:
        return x @ part.weight.T + part.scale * (x * mask) @ part.a.T @ part.b.T

    y = plain(torch.nn.functional.silu(plain(x, gate, one)) * plain(x, up, two), down, three)
    torch.testing.assert_close(ours, outcome(y, [x, *leaves((gate, up, down))]), rtol=1e-4, atol=5e-5)


def test_a_weight_that_is_made_is_made_once_forward_and_once_backward_and_never_kept() -> None:
    x, part, calls = inputs(T, K), made(32, 4), []

    def make() -> Tensor:
        calls.append(1)
        return part.weight.clone()

    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        (y,) = lora_linears(x, (Projection(**{**vars(part), "weight": make}),))
    assert len(calls) == 1
    assert part.weight.shape not in kept
    torch.testing.assert_close(
        outcome(y, [x, *leaves((part,))]), outcome(lora_linears(x, (part,)), [x, *leaves((part,))])
    )
    assert len(calls) == 2


class Largest(TorchDispatchMode):
    """Whether a tensor of some shape is ever made, other than as a view."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.seen = {frozenset(shape) for shape in shapes}, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and not func.is_view and frozenset(value.shape) in self.shapes:
                self.seen.append(str(func))
        return result


def test_neither_b_a_nor_the_gradient_of_a_base_is_ever_made() -> None:
    x, parts = inputs(T, K), block()
    with Largest((WIDTH, K), (20, WIDTH)) as largest:
        outcome(lora_mlp(x, *parts), [x, *leaves(parts)])
    assert largest.seen == []


@pytest.mark.parametrize(("keep", "wide"), [("projections", 2), ("input", 0)])
def test_an_mlp_keeps_the_projections_or_the_input_alone(keep: str, wide: int) -> None:
    x, parts, kept = inputs(T, K), block(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_mlp(x, *parts, keep=keep)
    assert sum(tensor.shape == (T, WIDTH) for tensor in kept) == wide
    assert sum(tensor.shape == (T, K) for tensor in kept) == 1


def test_on_the_meta_device_shapes_alone_come_out() -> None:
    """What estimates of memory run."""
    x, parts = inputs(T, K).detach().to("meta").requires_grad_(), []
    for part in block(bias=True):
        moved = {name: value.detach().to("meta") for name, value in vars(part).items() if torch.is_tensor(value)}
        parts.append(Projection(**{**vars(part), **moved}))
    y = lora_mlp(x, *parts)
    assert (y.shape, y.device.type) == ((T, 20), "meta")
    assert torch.autograd.grad(y.sum(), x)[0].shape == (T, K)


def test_what_wants_no_gradient_gets_none() -> None:
    x, parts = inputs(T, K), group()
    frozen = x.detach()
    ys = lora_linears(frozen, parts)
    found = torch.autograd.grad(ys[1].sum(), leaves(parts), allow_unused=True)
    assert [gradient is not None for gradient in found] == [False, False, True, True, False, False]
    assert not lora_mlp(frozen, *[Projection(weight=part.weight) for part in block()]).requires_grad
    half = Projection(weight=parts[0].weight, a=parts[0].a.detach(), b=parts[0].b)
    assert torch.autograd.grad(lora_linears(x, (half,))[0].sum(), half.b)[0].shape == half.b.shape


def test_a_second_derivative_is_refused() -> None:
    x, parts = inputs(T, K), block()
    for y in (lora_mlp(x, *parts), lora_linears(x, parts[:1])[0]):
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        with pytest.raises(RuntimeError):
            gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_pass_opcheck(dtype: torch.dtype, device) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    shared = (normal(5, 8), normal(5, 8), normal(5, 5), normal(8, 2), normal(8, 3))
    torch.library.opcheck(torch.ops.pegbox_kernels.lora_glu.default, (*shared, normal(2, 8), 1.0, 2.0, "gelu"))
    down = (normal(5, 2), normal(2, 8))
    for with_h in (False, True):
        arguments = (normal(5, 8), *shared, *down, 1.0, 2.0, "silu", with_h)
        torch.library.opcheck(torch.ops.pegbox_kernels.lora_glu_backward_.default, arguments)
    assert [tuple(one.shape) for one in glu.glu(*shared, down[1], 1.0, 2.0, "silu")] == [(5, 8), (5, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("call", ["linears", "mlp"])
def test_torch_compile_keeps_it_in_one_graph_with_the_same_gradient(call: str) -> None:
    x, parts = inputs(T, K), block(bias=True)

    def loss(x: Tensor) -> Tensor:
        ys = (lora_mlp(x, *parts),) if call == "mlp" else lora_linears(x, parts[:2])
        return sum(y.square().sum() for y in ys)

    expected = torch.autograd.grad(loss(x), [x, *leaves(parts[:2])])
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x), [x, *leaves(parts[:2])]), expected, rtol=1e-4, atol=1e-4
    )


def test_the_norm_of_a_row_needs_no_product_of_b_and_a() -> None:
    part = made(30, 6)
    found = projection.row_norms(part.weight, part.a.detach(), part.b.detach(), -1.5)
    whole = part.weight - 1.5 * part.b.detach() @ part.a.detach()
    torch.testing.assert_close(found, whole.norm(dim=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(8, 5)}, r"weight \(8, 5\) does not take x \(2, 24\)"),
        ({"weight": torch.zeros(8, K, requires_grad=True)}, "the base is frozen"),
        ({"weight": torch.zeros(9, K)}, r"b \(8, 2\) does not fit weight \(9, 24\)"),
        ({"a": torch.zeros(3, K)}, r"a \(3, 24\) and b \(8, 2\) do not fit"),
        ({"a": None}, "b but no a"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": 0.1, "magnitude": torch.ones(8)}, "dropout together with a magnitude"),
        ({"weight": torch.zeros(8, K, dtype=torch.bfloat16)}, "weight is torch.bfloat16 and x torch.float32"),
    ],
)
def test_a_wrong_argument_is_named_with_the_value_seen(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_linears(torch.zeros(2, K), (Projection(**{**vars(made(8, 2)), **change}),))


def test_a_wrong_name_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'"):
        lora_mlp(inputs(T, K), *block(), activation="relu")
    with pytest.raises(ValueError, match="keep is 'all'"):
        lora_mlp(inputs(T, K), *block(), keep="all")
    with pytest.raises(ValueError, match="there is no projection"):
        lora_linears(inputs(T, K), ())


def test_one_projection_alone_is_a_group_of_one() -> None:
    x, part = inputs(T, K), made(32, 8, bias=True)
    one = lora_linear(x, part.weight, part.a, part.b, part.scale, part.bias)
    torch.testing.assert_close(one, lora_linears(x, (part,))[0])
