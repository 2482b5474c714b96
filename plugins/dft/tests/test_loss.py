"""The loss equals TRL's, and its gradient that of the equation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pegbox.rows import UNTRAINED, Batch
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Outputs
from pegbox_dft.loss import DftLoss, weighed_likelihood


def test_loss_and_gradients_equal_trls(tmp_path: Path) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model, batch = tiny_model(), tiny_batches()[0]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0")),
        eos_token="t258",
        pad_token="t256",
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path), loss_type="dft", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False
    )
    theirs = tiny_model().module
    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    trainer = SFTTrainer(model=theirs, args=arguments, train_dataset=rows, processing_class=tokenizer)
    labels_BT = torch.full_like(batch.targets_BT, UNTRAINED)
    labels_BT[:, 1:] = batch.targets_BT[:, :-1]
    inputs = {"input_ids": batch.input_ids_BT, "labels": labels_BT, "attention_mask": batch.attention_mask_BT}
    theirs.train()
    expected = trainer.compute_loss(theirs, inputs, num_items_in_batch=torch.tensor(batch.trained_tokens))
    expected.backward()

    loss = DftLoss()
    (term,) = loss(batch, model.compute(model.module, batch, loss.needs)).terms
    value = term.total / term.count
    value.backward()
    torch.testing.assert_close(value.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    for (name, ours), other in zip(model.module.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gradient_is_minus_the_probability() -> None:
    logps = torch.log(torch.tensor([0.5, 0.1, 0.9])).requires_grad_()
    weighed_likelihood(logps).backward()
    torch.testing.assert_close(logps.grad, -torch.tensor([0.5, 0.1, 0.9]))


def test_the_ordinary_loss_is_logged_beside_it() -> None:
    targets = torch.tensor([[1, 2]])
    batch = Batch(input_ids_BT=targets, targets_BT=targets, trained_N=torch.tensor([0, 1]))
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    (metric,) = DftLoss()(batch, Outputs(logps_N=logps)).metrics
    assert (metric.name, metric.total.item(), metric.count) == ("nll", 3.0, 2.0)
    assert not metric.total.requires_grad


@pytest.mark.parametrize("count", [0, 3])
def test_half_precision_is_summed_in_float32(count: int) -> None:
    logps = torch.full((count,), -0.3).bfloat16().requires_grad_()
    total = weighed_likelihood(logps)
    assert total.dtype == torch.float32
    total.backward()
    assert logps.grad is not None
