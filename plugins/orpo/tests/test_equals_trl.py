"""Values, figures and gradients equal TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from orpo_rows import assert_same, padded, random_pairs, trl_batch, value_and_gradient
from pegbox.testing.tiny import tiny_model
from pegbox_orpo.config import OrpoConfig
from pegbox_orpo.loss import OrpoLoss


def trls(folder: Path, pairs: list, **settings: Any) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """What TRL's trainer makes of a batch: its loss, its figures, its gradient."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t257", eos_token="t258", pad_token="t256", model_max_length=512
    )
    arguments = ORPOConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **settings
    )
    model = tiny_model().module
    rows = Dataset.from_list([{"prompt": "t1 t2", "chosen": " t3 t4", "rejected": " t5"}])
    trainer = ORPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    loss, figures = trainer.get_batch_loss_metrics(model, trl_batch(pairs))
    loss.backward()
    return loss.item(), figures, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("alpha", [0.1, 0.7])
def test_loss_figures_and_gradients_equal_trls(alpha: float, tmp_path: Path) -> None:
    """With prompts of one token: TRL's likelihood is of the prompt too, of which the first token has none."""
    pairs = random_pairs(5, prompt=1)
    expected = trls(tmp_path, pairs, beta=alpha)
    ours = value_and_gradient(OrpoLoss(OrpoConfig(alpha=alpha)), [padded(pairs)])
    assert_same(ours, expected)
    assert expected[1].keys() - ours[1].keys() == {"logits/chosen", "logits/rejected"}
    assert ours[1].keys() - expected[1].keys() == {"odds_ratio"}


def test_figures_of_pairs_with_long_prompts_equal_trls(tmp_path: Path) -> None:
    """The likelihood aside, which is that of the answer given the prompt, as in the paper."""
    pairs = random_pairs(5, seed=1)
    _, expected, _ = trls(tmp_path, pairs)
    _, ours, _ = value_and_gradient(OrpoLoss(OrpoConfig()), [padded(pairs)])
    for name in ours.keys() & expected.keys() - {"nll_loss"}:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    chosen, labels = torch.zeros(5, 20, dtype=torch.int64), torch.full((5, 20), -100)
    for row, pair in enumerate(pairs):
        start, end = len(pair.prompt), len(pair.prompt + pair.chosen)
        chosen[row, :end] = torch.tensor(pair.prompt + pair.chosen)
        labels[row, start:end] = torch.tensor(pair.chosen)
    likelihood = tiny_model().module(input_ids=chosen, labels=labels).loss.item()
    torch.testing.assert_close(ours["nll_loss"], likelihood, rtol=1e-5, atol=1e-6)
