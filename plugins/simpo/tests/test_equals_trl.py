"""Values, figures and gradients equal TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.testing.tiny import tiny_model
from pegbox_simpo.config import SimpoConfig
from pegbox_simpo.loss import SimpoLoss
from simpo_rows import assert_same, padded, random_pairs, trl_batch, value_and_gradient


def trls(folder: Path, pairs: list, **settings: Any) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """What TRL's trainer makes of a batch: its loss, its figures, its gradient."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t257", eos_token="t258", pad_token="t256", model_max_length=512
    )
    arguments = CPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **settings
    )
    model = tiny_model().module
    rows = Dataset.from_list([{"prompt": "t1 t2", "chosen": " t3 t4", "rejected": " t5"}])
    trainer = CPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    loss, figures = trainer.get_batch_loss_metrics(model, trl_batch(pairs))
    loss.backward()
    return loss.item(), figures, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("ours", "trl"),
    [
        ({}, {}),
        ({"beta": 2.5, "gamma": 0.3}, {"beta": 2.5, "simpo_gamma": 0.3}),
        ({"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
        ({"sft_weight": 0.7}, {"cpo_alpha": 0.7}),
        ({"alpha": 0.25}, {"alpha": 0.25}),
    ],
)
def test_loss_figures_and_gradients_equal_trls(ours: dict[str, Any], trl: dict[str, Any], tmp_path: Path) -> None:
    pairs = random_pairs(5)
    made = value_and_gradient(SimpoLoss(SimpoConfig(**ours)), [padded(pairs)])
    expected = trls(tmp_path, pairs, **{"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0, **trl})
    assert_same(made, expected)
    without = {"logits/chosen", "logits/rejected"} | (set() if "sft_weight" in ours else {"nll_loss"})
    assert expected[1].keys() - made[1].keys() == without


def test_alphapo_is_trls(tmp_path: Path) -> None:
    pairs = random_pairs(4, seed=2)
    config = SimpoConfig(alpha=0.25, beta=2.5, gamma=0.5)
    expected = trls(tmp_path, pairs, loss_type="alphapo", alpha=0.25, beta=2.5, simpo_gamma=0.5)
    assert_same(value_and_gradient(SimpoLoss(config), [padded(pairs)]), expected)
