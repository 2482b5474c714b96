"""Values, figures and gradients equal TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cpo_rows import assert_same, padded, random_pairs, trl_batch, value_and_gradient
from pegbox.testing.tiny import tiny_model
from pegbox_cpo.config import CpoConfig
from pegbox_cpo.loss import CpoLoss


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
        ({"beta": 0.3, "label_smoothing": 0.2}, {"beta": 0.3, "label_smoothing": 0.2}),
        ({"loss": "hinge", "sft_weight": 0.5}, {"loss_type": "hinge", "cpo_alpha": 0.5}),
        ({"loss": "ipo", "sft_weight": 0.0}, {"loss_type": "ipo", "cpo_alpha": 0.0}),
        ({"loss": "ipo", "alpha": 0.25}, {"loss_type": "ipo", "alpha": 0.25}),
        ({"alpha": -0.01}, {"alpha": -0.01}),
    ],
)
def test_loss_figures_and_gradients_equal_trls(ours: dict[str, Any], trl: dict[str, Any], tmp_path: Path) -> None:
    pairs = random_pairs(5)
    made, expected = value_and_gradient(CpoLoss(CpoConfig(**ours)), [padded(pairs)]), trls(tmp_path, pairs, **trl)
    assert_same(made, expected)
    without = {"logits/chosen", "logits/rejected"} | (set() if ours.get("sft_weight", 1) else {"nll_loss"})
    assert expected[1].keys() - made[1].keys() == without


def test_defaults_are_those_of_trl() -> None:
    from trl.experimental.cpo import CPOConfig

    theirs, ours = CPOConfig.__dataclass_fields__, CpoConfig()
    assert ours.loss == theirs["loss_type"].default
    assert (ours.beta, ours.label_smoothing, ours.alpha) == (0.1, 0.0, 0.0)
    assert (ours.beta, ours.sft_weight) == (theirs["beta"].default, theirs["cpo_alpha"].default)
