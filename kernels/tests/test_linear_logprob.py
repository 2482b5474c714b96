"""A linear head without its logits: what it computes, when it computes again, and what autograd and compile make of it.

Agreement of the log-probabilities with the reference over shapes, layouts and dtypes is in test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from pegbox_kernels.harness.parity import compare
from pegbox_kernels.linear_logprob import linear_cross_entropy, linear_token_logprobs, ops, reference
from pegbox_kernels.linear_logprob.chunks import chunk_sizes
from pegbox_kernels.linear_logprob.spec import SPEC, SUMMED
from torch.nn import functional

N, H, V = 6, 24, 123


def head(rows: int = N, vocab: int = V, dtype: torch.dtype = torch.float32, frozen: bool = False):
    """Hidden states, weight, targets; the first two are leaves unless the weight is frozen."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, H, generator=generator).to(dtype)
    weight = (torch.randn(vocab, H, generator=generator) / 3).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), targets


def moved(device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in tensors]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each time that all logits are computed: whether their gradient is written."""
    seen: list[bool] = []

    def counted(products, *rest):
        seen.append(products.gradient)
        return ran(products, *rest)

    ran = ops.run
    monkeypatch.setattr(ops, "run", counted)
    return seen


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine with neither GPU nor interpreter takes."""
    monkeypatch.setattr(ops, "runs_kernels", lambda tensor: False)


@pytest.mark.parametrize("sample", SUMMED.samples, ids=lambda sample: sample.name)
def test_the_summed_loss_agrees_with_the_reference(sample, device) -> None:
    wrong = [str(found) for found in compare(SUMMED, sample, torch.float32, device) if not found.holds]
    assert wrong == []


@pytest.mark.parametrize("spec", [SPEC, SUMMED], ids=lambda spec: spec.name)
def test_without_kernels_every_sample_agrees_too(spec, without_kernels) -> None:
    cpu, wrong = torch.device("cpu"), []
    for sample in spec.samples:
        for dtype in spec.dtypes:
            wrong += [f"{sample.name}: {found}" for found in compare(spec, sample, dtype, cpu) if not found.holds]
    assert wrong == []


def test_the_loss_is_torchs_cross_entropy_with_label_smoothing(device) -> None:
    hidden, weight, targets = moved(device, *head())
    targets[2] = -100
    found = linear_cross_entropy(hidden, weight, targets, label_smoothing=0.2)
    truth = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum", label_smoothing=0.2)
    torch.testing.assert_close(found.loss_sum, truth)
    assert found.count.item() == N - 1
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(found.loss_sum, leaves), torch.autograd.grad(truth, leaves))


def test_z_loss_and_right_predictions_are_counted_beside_the_loss(device) -> None:
    hidden, weight, targets = moved(device, *head())
    logits = hidden @ weight.T
    targets[:4] = logits.argmax(-1)[:4]
    targets[0] = -100
    weights = torch.rand(N, device=device)
    found = linear_cross_entropy(hidden, weight, targets, z_loss=0.01, token_weights_N=weights)
    torch.testing.assert_close(found.z_loss_sum, 0.01 * (weights * logits.logsumexp(-1).square())[1:].sum())
    hits = logits.argmax(-1) == targets
    torch.testing.assert_close(found.correct, (weights * hits)[1:].sum())
    torch.testing.assert_close(found.count, weights[1:].sum())


def test_entropy_and_logps_are_those_of_torch_distributions_of_capped_logits(device) -> None:
    hidden, weight, targets = moved(device, *head())
    found = linear_token_logprobs(hidden, weight, targets, softcap=2.0, scale=1.5, temperature=0.6, entropy=True)
    logits = 2.0 * torch.tanh(1.5 * (hidden @ weight.T).double() / 2.0) / 0.6
    truth = torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(found.logps.double(), truth.log_prob(targets), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy.double(), truth.entropy(), rtol=1e-5, atol=1e-6)


def test_the_references_pass_gradcheck_in_fp64() -> None:
    hidden, weight, targets = head(rows=3, vocab=7)
    targets[1] = -100
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, torch.randn(7))]
    weights = torch.rand(3, dtype=torch.float64)

    def logps(x, w, b):
        return reference.linear_token_logprobs(x, w, targets, b, 1.2, 3.0, 0.8, -100, True)

    def loss(x, w, b):
        return reference.linear_cross_entropy(x, w, targets, b, weights, 0.1, 0.01, 1.2, 3.0, 0.8)[0]

    assert torch.autograd.gradcheck(logps, leaves)
    assert torch.autograd.gradcheck(loss, leaves)


def test_with_a_frozen_weight_logits_are_computed_once_for_any_loss_of_logps(passes, device) -> None:
    hidden, weight, targets = moved(device, *head(frozen=True))
    logps = linear_token_logprobs(hidden, weight, targets).logps
    loss = torch.nn.functional.softplus(-0.3 * (logps[:3].sum() - logps[3:].sum()))  # DPO's, say.
    (found,) = torch.autograd.grad(loss, (hidden,))
    assert passes == [True]
    logps = torch.log_softmax(hidden @ weight.T, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    truth = torch.nn.functional.softplus(-0.3 * (logps[:3].sum() - logps[3:].sum()))
    torch.testing.assert_close(found, torch.autograd.grad(truth, (hidden,))[0])


@pytest.mark.parametrize("kept", [True, False])
def test_a_uniform_gradient_that_was_promised_is_used_only_if_it_arrives(kept: bool, passes, device) -> None:
    hidden, weight, targets = moved(device, *head())
    coefficients = torch.linspace(-1, 2, N, device=device)
    results = []
    for uniform in (True, False):
        logps = linear_token_logprobs(hidden, weight, targets, uniform=uniform).logps
        loss = -logps.sum() / 7 if kept else (logps * coefficients).sum()
        results.append(torch.autograd.grad(loss, (hidden, weight)))
    torch.testing.assert_close(*results)
    assert passes == ([True, False, True] if kept else [True, True, False, True])


def test_equal_gradients_that_are_not_one_number_expanded_are_no_promise_kept(passes, device) -> None:
    """Looking at their values would make the host wait for the device."""
    hidden, weight, targets = moved(device, *head())
    logps = linear_token_logprobs(hidden, weight, targets, uniform=True).logps
    logps.backward(torch.full((N,), -0.5, device=device))
    assert passes == [True, True]


def test_an_entropys_gradient_is_right_whether_foreseen_or_not(passes, device) -> None:
    hidden, weight, targets = moved(device, *head(frozen=True))
    results = []
    for foreseen in (True, False):
        found = linear_token_logprobs(hidden, weight, targets, entropy=True, entropy_gradient=foreseen)
        results.append(torch.autograd.grad(found.entropy.sum() - found.logps.sum(), (hidden,)))
    torch.testing.assert_close(*results)
    assert passes == [False, True, True, True]


def test_an_entropy_that_is_only_watched_costs_nothing_more(passes, device) -> None:
    hidden, weight, targets = moved(device, *head(frozen=True))
    found = linear_token_logprobs(hidden, weight, targets, entropy=True)
    (-found.logps.sum() + 0 * found.entropy.detach().sum()).backward()
    assert passes == [True]


def test_without_gradients_none_are_written(passes, device) -> None:
    hidden, weight, targets = moved(device, *head())
    with torch.no_grad():
        linear_token_logprobs(hidden, weight, targets, uniform=True)
        linear_cross_entropy(hidden, weight, targets)
    assert passes == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_of_every_result_is_written(dtype: torch.dtype, device, poison) -> None:
    hidden, weight, targets = moved(device, *head(dtype=dtype))
    bias = torch.zeros(V, device=device, dtype=dtype, requires_grad=True)
    targets[1] = -100
    leaves = (hidden, weight, bias)
    with poison():
        for uniform in (True, False):
            found = linear_token_logprobs(hidden, weight, targets, bias_V=bias, entropy=True, uniform=uniform)
            once = torch.autograd.grad(found.logps.sum(), leaves, retain_graph=not uniform)
            made = [*found, *once]
            if not uniform:
                made += torch.autograd.grad(found.entropy.sum() + found.logsumexp.sum(), leaves)
            assert not any(tensor.isnan().any() for tensor in made)
        summed = linear_cross_entropy(hidden, weight, targets, bias_V=bias, label_smoothing=0.1, z_loss=0.1)
        made = [*summed, *torch.autograd.grad(summed.loss_sum, leaves)]
        assert not any(tensor.isnan().any() for tensor in made)


def test_rows_that_are_ignored_change_nothing_of_the_others(device) -> None:
    hidden, weight, targets = moved(device, *head(rows=8))
    kept = torch.tensor([0, 2, 3, 7], device=device)
    some = torch.full_like(targets, -1)
    some[kept] = targets[kept]
    found = linear_cross_entropy(hidden, weight, some, ignore_index=-1)
    alone = linear_cross_entropy(hidden[kept], weight, targets[kept])
    leaves = (hidden, weight)
    torch.testing.assert_close(found[:2], alone[:2])
    torch.testing.assert_close(torch.autograd.grad(found[0], leaves), torch.autograd.grad(alone[0], leaves))


@pytest.mark.parametrize("rows", [1, 127, 128, 1000, 16384, 16385, 20000])
@pytest.mark.parametrize("row_bytes", [256, 100514, 402176])
@pytest.mark.parametrize("budget", [1, 1 << 20, 64 << 20, 880 << 20])
def test_chunks_cover_all_rows_within_the_budget_and_are_alike(rows: int, row_bytes: int, budget: int) -> None:
    sizes = chunk_sizes(rows, row_bytes, budget)
    assert sum(sizes) == rows
    assert min(sizes) > 0
    assert max(sizes) * row_bytes <= max(budget, row_bytes)
    most = max(1, budget // row_bytes)
    unit = max(unit for unit in (1, 16, 32, 64, 128) if most // unit * unit >= 7 / 8 * most)
    assert all(size % unit == 0 for size in sizes[:-1])
    assert sizes[0] == max(sizes)
    assert sizes[0] - min(sizes[:-1], default=sizes[0]) <= unit


def test_the_default_budgets_keep_the_peak_below_one_and_four_gibibytes() -> None:
    """At 16384 x 2880 x 201088: scratch, the fp32 gradient of hidden, and that of the weight where it is trained."""
    from pegbox_kernels.linear_logprob import FROZEN_BYTES, TRAINED_BYTES

    hidden, weight = 16384 * 2880 * 4, 201088 * 2880 * 4
    frozen, trained = (chunk_sizes(16384, 201088 * 2, budget) for budget in (FROZEN_BYTES, TRAINED_BYTES))
    assert frozen == [2048] * 8
    assert trained == [4096] * 4
    assert frozen[0] * 201088 * 2 + hidden <= 1 << 30
    assert trained[0] * 201088 * 2 + hidden + weight <= 4 << 30


def test_no_more_logits_than_the_budget_are_made(without_kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = ops.plain.forward

    def watched(logits, *rest):
        seen.append((logits.shape[0], logits.untyped_storage().nbytes()))
        plain(logits, *rest)

    monkeypatch.setattr(ops.plain, "forward", watched)
    hidden, weight, targets = head(rows=100)
    linear_cross_entropy(hidden, weight, targets, logits_bytes=20 * 128 * 4)
    assert [rows for rows, _ in seen] == [20, 20, 20, 20, 20]
    assert {held for _, held in seen} == {20 * 128 * 4}


def test_under_autocast_an_fp32_weight_gets_an_fp32_gradient_of_bf16_products(device) -> None:
    hidden, weight, targets = moved(device, *head(rows=40))
    with torch.autocast(device.type, torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets).loss_sum
        plain = functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")
    truth = functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    ours, theirs, exact = (torch.autograd.grad(loss, (hidden, weight)) for loss in (found, plain, truth))
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - true).abs().max() <= 2 * (other - true).abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: graphs")
@pytest.mark.parametrize("trained", [False, True])
def test_on_a_gpu_a_step_gives_the_same_bits_again_and_can_be_captured(trained: bool, device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(2000, 256, generator=generator, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(50257, 256, generator=generator, device=device, dtype=torch.bfloat16).div_(16)
    targets = torch.randint(50257, (2000,), generator=generator, device=device)
    weight.requires_grad_(trained)
    leaves = (hidden, weight) if trained else (hidden,)

    def step() -> list[torch.Tensor]:
        logps = linear_token_logprobs(hidden, weight, targets, uniform=True, logits_bytes=64 << 20).logps
        # Without its graph, which keeps the node of a leaf and with it the stream that it was made in: a capture in
        # another stream, which would have to wait for that, is refused.
        return [logps.detach(), *torch.autograd.grad(-logps.sum(), leaves)]

    expected = step()
    torch.testing.assert_close(step(), expected, rtol=0, atol=0, msg=lambda text: f"again: {text}")
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        torch.testing.assert_close(step(), expected, rtol=0, atol=0, msg=lambda text: f"on a stream: {text}")
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0, msg=lambda text: f"captured: {text}")


@pytest.mark.parametrize("largest", [100.0, 3000.0, 20000.0])
def test_a_frozen_head_is_exact_where_the_largest_logits_come_last(largest: float, device) -> None:
    """The one pass over a row raises its reference then, and scales what it wrote. Width 1: logits have no rounding."""
    vocab = 10000
    hidden = torch.tensor([[1.0], [0.5], [-1.0], [0.0]], device=device)
    weight = torch.linspace(0, largest, vocab, device=device).unsqueeze(-1)
    targets = torch.tensor([9999, 5000, 9000, 17], device=device)
    leaf, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found = linear_token_logprobs(leaf, weight, targets).logps
    truth = functional.linear(exact, weight.double()).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)
    grad, true_grad = torch.autograd.grad(found.sum(), leaf)[0], torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6 * largest)


@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_gradient_of_a_frozen_heads_hidden_states_is_as_exact_as_that_of_a_trained_head(
    spread: float, device
) -> None:
    """One pass against two, in bf16, each against fp64: the factor of a row costs no accuracy."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(40, 64, generator=generator).to(device, torch.bfloat16)
    weight = (torch.randn(1500, 64, generator=generator) * spread / 8).to(device, torch.bfloat16)
    targets = torch.randint(1500, (40,), generator=generator).to(device)
    exact = hidden.double().requires_grad_()
    loss = functional.cross_entropy(functional.linear(exact, weight.double()), targets, reduction="sum")
    (truth,) = torch.autograd.grad(loss, exact)
    errors = []
    for trained in (False, True):
        leaf = hidden.float().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            loss = linear_cross_entropy(leaf, weight.clone().requires_grad_(trained), targets).loss_sum
        errors.append((torch.autograd.grad(loss, leaf)[0].double() - truth).norm())
    assert 0 < errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("factors", [False, True])
def test_a_program_that_takes_several_rows_writes_what_one_for_each_row_writes(factors: bool, device) -> None:
    """Default grids have more programs than tests have rows."""
    kernels = pytest.importorskip("pegbox_kernels.linear_logprob.triton")
    from pegbox_kernels.linear_logprob.launch import Launch
    from pegbox_kernels.linear_logprob.rows import Coefficients, Objective, Rows, Rule

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 3000, generator=generator).to(device)
    targets, rule = torch.tensor([0, 2999, -100, 5, 2047, -100, 2048], device=device), Rule(1.0, 0.0, 1.0, -100)
    results = []
    for programs in (7, 3):
        launch, made = Launch(2, 2, programs), logits.clone()
        rows = Rows.new(7, device, entropy=False, mean=False, hits=True, factors=factors)
        kernels.forward(made, None, targets, rule, Objective(), rows, True, launch=launch)
        again, ones = logits.clone(), torch.ones(7, device=device)
        coefficients = Coefficients(rows.largest_N, rows.log_total_N, ones, ones[:0], -ones)
        kernels.backward(again, None, targets, rule, coefficients, launch=launch)
        results.append((made, again, *rows))
        whole = made * rows.factors_N.unsqueeze(-1) if factors else made
        torch.testing.assert_close(whole, again, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert [Launch(1, 1, 132).grid(rows)[0] for rows in (1, 132, 133, 4096)] == [1, 132, 67, 128]
