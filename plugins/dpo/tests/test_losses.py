"""What TRL's trainer cannot show: flipped labels, answers that are out of all proportion, empty and unread batches."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log1p
from typing import Any, get_args

import pytest
import torch
from pairs_of_answers import padded, pair, some_pairs
from pegbox.rows import Extra
from pegbox.types import Outputs
from pegbox_dpo import differences
from pegbox_dpo.config import OF_DIFFERENCES, SMOOTHED, Divergence, DpoConfig, LossName
from pegbox_dpo.loss import DpoLoss

ALL: list[dict[str, Any]] = [
    {"loss": name, **({"label_smoothing": 0.1} if name in SMOOTHED else {})} for name in get_args(LossName)
]
STEEP: list[dict[str, Any]] = [
    {"loss": name, "f_divergence": divergence, **({"label_smoothing": 0.1} if name in SMOOTHED else {})}
    for name in sorted(OF_DIFFERENCES)
    for divergence in get_args(Divergence)
    if name != "ipo" or divergence not in ("forward_kl", "alpha_divergence")
]
"""The square of an exponential is left out: there the loop stops the run, because the loss is infinite."""
ALSO: list[dict[str, Any]] = [{"ld_alpha": 0.4}, {"use_weighting": True}, {"token_metrics": True}]


def made_up(pairs: int = 4) -> tuple[Any, Outputs]:
    """A batch with a reference, and outputs of a vocabulary of 260 for it."""
    batch = padded([pair(*one) for one in some_pairs(pairs)])
    logits_NV = torch.randn(len(batch.trained_N), 260, generator=torch.Generator().manual_seed(5))
    logps_NV = logits_NV.log_softmax(-1)
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    logps_N = logps_NV.gather(-1, targets_N[:, None])[:, 0].detach().requires_grad_()
    return batch, Outputs(logps_N=logps_N, logits_NV=logits_NV, entropy_N=-(logps_NV.exp() * logps_NV).sum(-1))


@pytest.mark.parametrize("margin", [-7.0, 0.0, 3.0])
def test_smoothing_is_the_expectation_over_flipped_labels(margin: float) -> None:
    right, flipped = log1p(exp(-0.5 * margin)), log1p(exp(0.5 * margin))
    value = differences.sigmoid(torch.tensor([margin]), 0.5, 0.2)
    assert value.item() == pytest.approx(0.8 * right + 0.2 * flipped, rel=1e-6)


@pytest.mark.parametrize("config", [*ALL, *STEEP], ids=str)
def test_answers_out_of_all_proportion_give_numbers(config: dict[str, Any]) -> None:
    """Log-ratios of thousands of nats, as long answers have them when a run diverges."""
    batch, outputs = made_up()
    for scale in (-400.0, 400.0):
        signs_N = 1 - 2 * (batch.document_N % 2)
        logps_N = (outputs.logps_N.detach() + scale * signs_N).requires_grad_()
        for term in DpoLoss(DpoConfig(**config))(batch, replace(outputs, logps_N=logps_N)).terms:
            assert term.total.isfinite()
            term.total.backward()
        assert logps_N.grad is not None
        assert logps_N.grad.isfinite().all()


@pytest.mark.parametrize("config", [*ALL, *ALSO], ids=str)
def test_a_batch_without_rows_is_zero_and_hangs_on_the_graph(config: dict[str, Any]) -> None:
    batch, outputs = made_up()
    nothing = batch.trained_N[:0]
    extra = {"reference_logps": Extra(value=torch.zeros(0), layout="trained")}
    parts = {"trained_N": nothing, "document_N": nothing, "last_D": nothing, "sign_D": None, "rows": (), "extra": extra}
    empty = replace(batch, **parts)
    assert outputs.logps_N is not None
    assert outputs.logits_NV is not None
    assert outputs.entropy_N is not None
    none = Outputs(logps_N=outputs.logps_N[:0], logits_NV=outputs.logits_NV[:0], entropy_N=outputs.entropy_N[:0])
    loss = DpoLoss(DpoConfig(**config))
    assert set(loss.counts(empty).values()) == {0.0}
    output = loss(empty, none)
    for term in output.terms:
        assert term.total.item() == 0.0
        assert term.total.requires_grad
    assert all(float(term.count) == 0.0 for term in output.metrics)


@pytest.mark.parametrize("config", [*ALL, *STEEP, *ALSO], ids=str)
def test_no_value_is_read_from_the_device(config: dict[str, Any]) -> None:
    """Fake tensors have no values: whatever reads one, or makes a shape of one, fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch, outputs = made_up()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
        reference = batch.extra["reference_logps"]
        extra = {"reference_logps": replace(reference, value=mode.from_tensor(reference.value))}
        unread = replace(batch, **fake, extra=extra)
        made = {name: mode.from_tensor(value) for name, value in vars(outputs).items() if value is not None}
        output = DpoLoss(DpoConfig(**config))(unread, Outputs(**made))
    assert all(term.total.shape == () for term in (*output.terms, *output.metrics))


def test_the_shared_part_of_two_answers_keeps_its_weight() -> None:
    batch, outputs = made_up(2)
    loss = DpoLoss(DpoConfig(loss="sppo_hard", ld_alpha=0.0))
    (term,) = loss(batch, outputs).terms
    term.total.backward()
    assert outputs.logps_N is not None
    assert outputs.logps_N.grad is not None
    felt = [bool(value) for value in outputs.logps_N.grad]
    # Answers of 5 and 2 tokens, and of 1 and 6: the first 2 of each, then the first 1.
    assert felt == [*[True] * 2, *[False] * 3, *[True] * 2, True, True, *[False] * 5]
