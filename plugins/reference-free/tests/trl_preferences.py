"""What TRL's trainers make of preferences whose logits are fixed: loss, figures, and the gradient of each logit.

P  pairs    B  answers, 2 P: chosen and rejected in turn    T  tokens    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from pair_rows import Pair, padded
from pegbox.testing.tiny import PAD, VOCABULARY, compute, tiny_model
from pegbox.types import Loss
from torch import Tensor


class Compared(NamedTuple):
    """One side's loss, figures, and gradient of each logit, (B, T, V)."""

    loss: float
    figures: dict[str, float]
    gradient_BTV: Tensor


def logits_of(pairs: Sequence[Pair], spread: float, seed: int = 0) -> Tensor:
    """Random logits of padded answers, (B, T, V); the target's is raised, so that tokens have all kinds of odds."""
    source, targets_BT = torch.Generator().manual_seed(seed), padded(pairs).targets_BT
    logits_BTV = spread * torch.randn(*targets_BT.shape, VOCABULARY, generator=source)
    raised_BT1 = 2 * spread * torch.rand(*targets_BT.shape, 1, generator=source)
    return logits_BTV.scatter_add(-1, targets_BT.clamp(min=0)[..., None], raised_BT1)


def ours(loss: Loss, pairs: Sequence[Pair], logits_BTV: Tensor) -> Compared:
    """By the loss under test, of log-probabilities by plain torch."""
    leaf_BTV, batch = logits_BTV.clone().requires_grad_(), padded(pairs)
    fixed: Any = lambda **_: SimpleNamespace(logits=leaf_BTV, hidden_states=None)  # noqa: E731
    output, counts = loss(batch, compute(fixed, batch, loss.needs)), loss.counts(batch)
    value = torch.stack([term.weight * term.total / counts[term.name] for term in output.terms]).sum()
    value.backward()
    figures = {term.name: float(term.total.detach() / counts[term.name]) for term in output.terms}
    figures |= {term.name: float(term.total / term.count) for term in output.metrics}
    assert leaf_BTV.grad is not None
    return Compared(value.item(), figures, leaf_BTV.grad)


class Theirs:
    """A trainer of TRL: `name` is cpo or orpo."""

    def __init__(self, name: str, folder: Path) -> None:
        import importlib

        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="t257", eos_token="t258", pad_token="t256", model_max_length=512
        )
        module = importlib.import_module(f"trl.experimental.{name}")
        self._config = getattr(module, f"{name.upper()}Config")
        self._trainer = getattr(module, f"{name.upper()}Trainer")
        self._tokenizer, self._folder = tokenizer, folder
        self._rows = Dataset.from_list([{"prompt": "t1 t2", "chosen": " t3 t4", "rejected": " t5"}])

    def __call__(self, pairs: Sequence[Pair], logits_BTV: Tensor, **settings: Any) -> Compared:
        arguments = self._config(
            output_dir=str(self._folder),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            **settings,
        )
        trainer = self._trainer(
            model=tiny_model().module, args=arguments, train_dataset=self._rows, processing_class=self._tokenizer
        )
        # All chosen answers come before the rejected ones there.
        leaf_BTV = logits_BTV.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1).clone().requires_grad_()
        value, figures = trainer.get_batch_loss_metrics(
            lambda *_, **__: SimpleNamespace(logits=leaf_BTV), batch_of(pairs)
        )
        value.backward()
        assert leaf_BTV.grad is not None
        gradient_BTV = leaf_BTV.grad.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)
        return Compared(value.item(), figures, gradient_BTV)


def batch_of(pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """The pairs as TRL's collator gives them."""
    batch, made = padded(pairs), {}
    labels_BT = torch.full_like(batch.targets_BT, -100)
    labels_BT[:, 1:] = batch.targets_BT[:, :-1]
    for first, side in enumerate(("chosen", "rejected")):
        made[f"{side}_input_ids"] = batch.input_ids_BT[first::2]
        made[f"{side}_labels"] = labels_BT[first::2]
        made[f"{side}_attention_mask"] = (batch.input_ids_BT[first::2] != PAD).long()
    return made


def assert_equal(left: Compared, right: Compared) -> None:
    """Loss, figures that both have, and each element of the gradient are equal."""
    torch.testing.assert_close(left.loss, right.loss, rtol=1e-5, atol=1e-6)
    # A margin is as exact as the rewards it is the difference of.
    largest = max(abs(value) for name, value in right.figures.items() if name.startswith("rewards/"))
    for name in left.figures.keys() & right.figures.keys():
        exact = max(1e-6, 1e-5 * largest) if name == "rewards/margins" else 1e-6
        torch.testing.assert_close(left.figures[name], right.figures[name], rtol=1e-5, atol=exact, msg=name)
    torch.testing.assert_close(left.gradient_BTV, right.gradient_BTV, rtol=1e-5, atol=1e-6)
