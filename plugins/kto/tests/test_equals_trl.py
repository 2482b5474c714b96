"""Values, figures and gradients equal TRL's, the divergence from mismatched answers included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixed_logits import FixedLogits
from kto_rows import LOGPS, Answer, Tiny, assert_same, example_of, padded, random_answers, source_of, value_and_gradient
from pegbox.rows import Extra
from pegbox.testing.tiny import PAD, collate, compute, tiny_model
from pegbox_kto.config import KtoConfig
from pegbox_kto.loss import KtoLoss
from pegbox_kto.losses import kl_estimate
from pegbox_kto.mismatch import mismatched

Result = tuple[float, dict[str, float]]


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """TRL's trainer of the tiny model, with another one as reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import KTOConfig as TrlConfig
    from trl import KTOTrainer

    def make(loss: str = "kto", **settings: Any) -> Any:
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t258", pad_token="t256")
        arguments = TrlConfig(
            output_dir=str(tmp_path),
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            loss_type=loss,
            **settings,
        )
        rows = [{"prompt": "t1 t2", "completion": " t3", "label": label} for label in (True, False)]
        return KTOTrainer(
            model=tiny_model().module,
            ref_model=tiny_model(seed=1).module,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return make


def of_trl(trainer: Any, policy: torch.nn.Module, answers: list[Answer]) -> Result:
    """TRL's loss and figures of a batch; the gradients are left where they belong."""
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    examples = [
        {
            "prompt_ids": answer.prompt,
            "completion_ids": answer.ids,
            "KL_completion_ids": answers[at - 1].ids,
            "label": answer.wanted,
        }
        for at, answer in enumerate(answers)
    ]
    trainer.model.train()
    loss = trainer.compute_loss(policy, DataCollatorForUnpairedPreference(pad_token_id=PAD)(examples))
    loss.backward()
    return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items()}


CASES = [
    ({}, True),
    ({"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}, True),
    ({}, False),
    ({"loss": "apo_zero_unpaired", "beta": 0.2}, False),
]


def share_of_wanted(answers: list[Answer]) -> float:
    """A figure that TRL does not log."""
    return sum(answer.wanted for answer in answers) / len(answers)


def of_fixed_logits(
    settings: dict[str, Any], answers: list[Answer], policy: FixedLogits, reference: FixedLogits
) -> Result:
    """Our loss and figures of the logits of a policy and a reference; the gradient is left in the policy."""

    def logps(model: FixedLogits, batch: Any) -> torch.Tensor:
        found = compute(model, batch, LOGPS).logps_N
        assert found is not None
        return found

    batch, examples = padded(answers), [example_of(answer) for answer in answers]
    made = mismatched(examples, examples[-1])
    wanted = sum(answer.wanted for answer in answers)
    with torch.no_grad():
        others = collate(made)
        kl = kl_estimate((logps(policy, others) - logps(reference, others)).sum(), len(made))
        extra = {
            "reference_logps": Extra(value=logps(reference, batch), layout="trained"),
            "kto_kl": Extra(value=kl, layout="global"),
            "kto_answers": Extra(value=torch.tensor([wanted, len(answers) - wanted]), layout="global"),
        }
    loss = KtoLoss(KtoConfig(**settings))
    batch = replace(batch, extra=extra)
    output = loss(batch, compute(policy, batch, LOGPS))
    value = output.terms[0].total / loss.counts(batch)["kto"]
    value.backward()
    return value.item(), {term.name: float(term.total / term.count) for term in output.metrics}


@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize(("settings", "diverged"), CASES)
def test_on_fixed_logits_the_gradient_of_each_logit_equals_trls(
    settings: dict[str, Any], diverged: bool, spread: float, trainer: Callable[..., Any]
) -> None:
    from trl.trainer.utils import add_fused_lm_head

    answers, (policy, reference, theirs) = random_answers(7, seed=4), (FixedLogits(s, spread) for s in (2, 1, 2))
    if not diverged:
        policy, reference, theirs = (FixedLogits(s, spread) for s in (1, 2, 1))
    made = trainer(**settings)
    for model in (theirs, made_reference := FixedLogits(reference.seed, spread)):
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits"))
    made.ref_model = made_reference
    expected, figures = of_trl(made, theirs, answers)
    value, ours = of_fixed_logits(settings, answers, policy, reference)
    if "loss" not in settings:
        assert (figures["kl"] > 0) == diverged
    assert value == pytest.approx(expected, rel=1e-5, abs=1e-6)
    figures["share/chosen"] = share_of_wanted(answers)
    for name, figure in ours.items():
        assert figure == pytest.approx(figures[name], rel=1e-5, abs=1e-6), name
    assert policy.leaf_BTV is not None
    assert theirs.leaf_BTV is not None
    torch.testing.assert_close(policy.leaf_BTV.grad, theirs.leaf_BTV.grad, rtol=1e-5, atol=1e-6)
    assert policy.leaf_BTV.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("settings", "diverged"), CASES)
def test_loss_figures_and_gradients_of_a_model_equal_trls(
    settings: dict[str, Any], diverged: bool, tmp_path: Path, trainer: Callable[..., Any]
) -> None:
    """With the divergence as a run measures it, over the micro-batches of a step."""
    answers = random_answers(7, 4 if diverged or "loss" in settings else 2)
    theirs = trainer(**settings)
    expected, figures = of_trl(theirs, theirs.model, answers)
    assert (figures["kl"] > 0) == diverged
    tiny = Tiny([example_of(answer) for answer in answers])
    source, model, _ = source_of(tmp_path / "run", tiny, kto=settings, micro_batch=3)
    made = value_and_gradient(KtoLoss(KtoConfig(**settings)), next(iter(source)), model)
    figures["share/chosen"] = share_of_wanted(answers)
    assert_same(made, (expected, figures, [p.grad for p in theirs.model.parameters()]))
    assert made[1].keys() - figures.keys() == set()
    others = {"logits/chosen", "logits/rejected", "entropy", "num_tokens"}
    assert figures.keys() - made[1].keys() == others | ({"kl"} if "loss" in settings else set())


def test_defaults_are_those_of_trl() -> None:
    from trl import KTOConfig as TrlConfig

    theirs, ours = TrlConfig.__dataclass_fields__, KtoConfig()
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        assert getattr(ours, name) == theirs[name].default
    assert ours.loss == theirs["loss_type"].default
