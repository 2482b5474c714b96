"""The loss equals torch's cross-entropy and does not depend on how a step is split."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.rows import UNTRAINED, Batch
from pegbox.types import Outputs
from pegbox_sft.loss import SftLoss

V = 23


def batch_of(targets_BT: torch.Tensor) -> Batch:
    trained_N = (targets_BT.flatten() != UNTRAINED).nonzero().flatten()
    return Batch(input_ids_BT=torch.zeros_like(targets_BT), targets_BT=targets_BT, trained_N=trained_N)


def logps_of(logits_BTV: torch.Tensor, batch: Batch) -> Outputs:
    logits_NV = logits_BTV.flatten(0, 1)[batch.trained_N]
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    return Outputs(logps_N=logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1))


def random_step(seed: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (rows, length), generator=source)
    targets[torch.rand(rows, length, generator=source) < 0.4] = UNTRAINED
    return targets, torch.randn(rows, length, V, generator=source)


def test_total_and_gradient_equal_torch_cross_entropy() -> None:
    targets, logits = random_step(0, 5, 17)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    batch = batch_of(targets)
    (term,) = SftLoss()(batch, logps_of(ours, batch)).terms
    expected = torch.nn.functional.cross_entropy(
        theirs.flatten(0, 1), targets.flatten(), ignore_index=UNTRAINED, reduction="sum"
    )
    torch.testing.assert_close(term.total, expected)
    term.total.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert term.count == int((targets != UNTRAINED).sum())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 7)))
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(seed: int, cuts: set[int]) -> None:
    targets, logits = random_step(seed, 8, 9)
    loss = SftLoss()

    def value_and_gradient(borders: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().double().requires_grad_()
        parts = [(leaf[a:b], batch_of(targets[a:b])) for a, b in itertools.pairwise(borders)]
        count = sum(loss.counts(batch)["sft"] for _, batch in parts)
        value = sum(loss(batch, logps_of(part, batch)).terms[0].total / count for part, batch in parts)
        value.backward()
        return value.detach(), leaf.grad

    whole, split = value_and_gradient([0, 8]), value_and_gradient([0, *sorted(cuts), 8])
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-7)


def test_counts_depend_on_the_batch_alone() -> None:
    targets, _ = random_step(3, 4, 6)
    assert SftLoss().counts(batch_of(targets)) == {"sft": float((targets != UNTRAINED).sum())}


def test_a_micro_batch_without_trained_tokens_adds_zero_and_zero_gradient() -> None:
    logits = torch.randn(2, 3, V, requires_grad=True)
    batch = batch_of(torch.full((2, 3), UNTRAINED))
    (term,) = SftLoss()(batch, logps_of(logits, batch)).terms
    term.total.backward()
    assert term.total.item() == 0.0
    assert term.count == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_the_sum_is_made_in_float32_from_half_precision() -> None:
    logps = torch.full((4096,), -1.0009765625).bfloat16()
    total = SftLoss()(batch_of(torch.zeros(1, 4096, dtype=torch.long)), Outputs(logps_N=logps)).terms[0].total
    assert total.dtype == torch.float32
    assert total.item() == -logps.double().sum().item()
