"""Every loss, option and metric against TRL's own trainer on the same model and rows: values, and gradients with
respect to log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairs_of_answers import padded, pair, some_pairs
from pegbox.rows import Extra
from pegbox.testing.tiny import tiny_model
from pegbox.types import Outputs
from pegbox_dpo.config import DpoConfig
from pegbox_dpo.loss import DpoLoss

PAIRS = 5
SINGLE = ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero")
SINGLE += ("apo_down", "discopop", "sft", "sigmoid_norm")
OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "discopop")
CASES: list[dict[str, Any]] = [
    *({"loss": name} for name in SINGLE),
    {"loss": "exo_pair", "label_smoothing": 1e-3},
    {"loss": "robust", "label_smoothing": 0.2, "beta": 0.5},
    {"loss": "aot", "label_smoothing": 0.1},
    {"loss": "aot_unpaired", "label_smoothing": 0.1},
    {"loss": "discopop", "discopop_tau": 0.5},
    *({"loss": name, "f_divergence": "forward_kl"} for name in OF_DIFFERENCES),
    *({"loss": name, "f_divergence": "js_divergence"} for name in OF_DIFFERENCES),
    *({"loss": name, "f_divergence": "alpha_divergence"} for name in OF_DIFFERENCES),
    {"loss": "exo_pair", "f_divergence": "js_divergence", "label_smoothing": 0.01},
    {"loss": "sigmoid", "f_divergence": "alpha_divergence", "f_alpha": 1.0},
    {"loss": "hinge", "f_divergence": "alpha_divergence", "f_alpha": 1.7},
    *({"loss": name, "ld_alpha": 0.3} for name in ("sigmoid", "ipo", "aot", "bco_pair", "apo_down")),
    {"loss": "sigmoid", "ld_alpha": 0.0},
    *({"loss": name, "use_weighting": True} for name in ("sigmoid", "ipo", "sppo_hard", "apo_zero")),
    {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, "ld_alpha": 0.5},
    {"loss": {"hinge": 0.5, "aot": 0.25}, "beta": 0.3},
]


def named(case: dict[str, Any]) -> str:
    return "-".join("+".join(value) if isinstance(value, dict) else f"{value}" for value in case.values())


def rounded(logps: torch.Tensor) -> torch.Tensor:
    """Multiples of 1/1024, whose sums are exact in any order: some losses are as steep as exponentials."""
    return (logps * 1024).round() / 1024


class Theirs:
    """TRL's trainer, and what its models gave for one batch."""

    def __init__(self, trainer: Any, pairs: list[Any]) -> None:
        self.trainer, self.pairs = trainer, pairs
        rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), one, strict=True)) for one in pairs]
        self.inputs = trainer.data_collator(rows)
        mask = self.inputs["completion_mask"][:, 1:].bool()
        lines = torch.arange(2 * len(pairs)).view(2, -1).T.flatten()
        width = mask.shape[1]
        self.places_N = torch.cat([line * width + mask[line].nonzero()[:, 0] for line in lines])
        labels = self.inputs["input_ids"].masked_fill(self.inputs["completion_mask"] == 0, -100)
        given = {"input_ids": self.inputs["input_ids"], "attention_mask": self.inputs["attention_mask"]}
        with torch.no_grad():
            self.outputs = trainer.model(**given, labels=labels, use_cache=False, fused_lm_head=True)
            self.reference = trainer.ref_model(**given, labels=labels, use_cache=False, fused_lm_head=True).log_probs
            self.logits = trainer.model(**given).logits[:, :-1]
        self.exact, reference = rounded(self.outputs.log_probs), rounded(self.reference)
        trainer.ref_model = lambda **_: SimpleNamespace(log_probs=reference)

    def flat(self, values: torch.Tensor) -> torch.Tensor:
        """Values of trained tokens in our order: chosen and rejected answer in turn."""
        return values.flatten(0, 1)[self.places_N]

    def loss(self, config: DpoConfig) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """Value, gradient of each trained token's log-probability, metrics."""
        trainer = self.trainer
        trainer.beta, trainer.label_smoothing, trainer.ld_alpha = config.beta, config.label_smoothing, config.ld_alpha
        trainer.loss_types, trainer.loss_weights = list(config.weights), list(config.weights.values())
        trainer.f_divergence_type, trainer.f_alpha_divergence_coef = config.f_divergence, config.f_alpha
        trainer.use_weighting, trainer.args.discopop_tau = config.use_weighting, config.discopop_tau
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        leaf = self.exact.clone().requires_grad_()
        fixed = SimpleNamespace(**{**vars(self.outputs), "log_probs": leaf})
        value = trainer._compute_loss(lambda **_: fixed, self.inputs, return_outputs=False)
        value.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return value.detach(), self.flat(leaf.grad), metrics


@pytest.fixture(scope="module")
def theirs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Theirs:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_weighting=True,
        loss_type=["sigmoid"],
    )
    trainer = DPOTrainer(
        model=tiny_model(initializer_range=0.2).module,
        ref_model=tiny_model(seed=1, initializer_range=0.2).module,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "t1", "chosen": "t2", "rejected": "t3"}]),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.model.train()
    return Theirs(trainer, some_pairs(PAIRS))


@pytest.mark.parametrize("case", CASES, ids=named)
def test_value_gradient_and_metrics_equal_trls(theirs: Theirs, case: dict[str, Any]) -> None:
    config = DpoConfig(token_metrics=True, **case)
    batch = padded([pair(*one) for one in theirs.pairs])
    reference = Extra(value=theirs.flat(rounded(theirs.reference)), layout="trained")
    batch = replace(batch, extra={"reference_logps": reference})
    logps_N = theirs.flat(theirs.exact).clone().requires_grad_()
    outputs = Outputs(
        logps_N=logps_N, logits_NV=theirs.flat(theirs.logits), entropy_N=theirs.flat(theirs.outputs.entropy)
    )
    loss = DpoLoss(config)
    counts, output = loss.counts(batch), loss(batch, outputs)
    value = sum(term.weight * term.total / counts[term.name] for term in output.terms)
    value.backward()

    expected, gradient, metrics = theirs.loss(config)
    torch.testing.assert_close(value.detach(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logps_N.grad, gradient, rtol=1e-5, atol=1e-6)
    ours = {term.name: float(term.total / term.count) for term in output.metrics}
    if not config.needs_reference:
        metrics = {name: value for name, value in metrics.items() if not name.startswith("rewards/")}
    assert ours.keys() == metrics.keys() - {"num_tokens"}
    for name, ours_now in ours.items():
        assert ours_now == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name


def test_our_forward_gives_trls_log_probabilities(theirs: Theirs) -> None:
    model, batch = tiny_model(initializer_range=0.2), padded([pair(*one) for one in theirs.pairs])
    ours = model.compute(model.module.eval(), batch, frozenset({"logps", "entropy"}))
    torch.testing.assert_close(ours.logps_N, theirs.flat(theirs.outputs.log_probs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.entropy_N, theirs.flat(theirs.outputs.entropy), rtol=1e-5, atol=1e-5)
