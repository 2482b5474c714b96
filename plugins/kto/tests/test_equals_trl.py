"""Values, figures and gradients equal TRL's, the divergence from mismatched answers included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kto_rows import Answer, Tiny, assert_same, example_of, random_answers, source_of, value_and_gradient
from pegbox.testing.tiny import PAD, tiny_model
from pegbox_kto.config import KtoConfig
from pegbox_kto.loss import KtoLoss


def trls(folder: Path, answers: list[Answer], **settings: Any) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """What TRL's trainer makes of a batch, with a random model of another seed as reference."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import KTOConfig as TrlConfig
    from trl import KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(260)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t258", pad_token="t256")
    arguments = TrlConfig(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, **settings
    )
    policy, reference = tiny_model().module, tiny_model(seed=1).module
    rows = Dataset.from_list([{"prompt": "t1 t2", "completion": " t3", "label": label} for label in (True, False)])
    trainer = KTOTrainer(
        model=policy, ref_model=reference, args=arguments, train_dataset=rows, processing_class=tokenizer
    )
    examples = [
        {
            "prompt_ids": answer.prompt,
            "completion_ids": answer.ids,
            "KL_completion_ids": answers[at - 1].ids,
            "label": answer.wanted,
        }
        for at, answer in enumerate(answers)
    ]
    policy.train()
    loss = trainer.compute_loss(policy, DataCollatorForUnpairedPreference(pad_token_id=PAD)(examples))
    loss.backward()
    figures = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return loss.item(), figures, [p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize(
    ("settings", "seed", "diverged"),
    [
        ({}, 4, True),
        ({"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.75}, 4, True),
        ({}, 2, False),
        ({"loss": "apo_zero_unpaired", "beta": 0.2}, 4, False),
    ],
)
def test_loss_figures_and_gradients_equal_trls(
    settings: dict[str, Any], seed: int, diverged: bool, tmp_path: Path
) -> None:
    answers = random_answers(7, seed)
    theirs = dict(settings)
    if "loss" in theirs:
        theirs["loss_type"] = theirs.pop("loss")
    expected = trls(tmp_path, answers, **theirs)
    assert (expected[1]["kl"] > 0) == diverged
    tiny = Tiny([example_of(answer) for answer in answers])
    source, model, _ = source_of(tmp_path / "run", tiny, kto=settings, micro_batch=3)
    made = value_and_gradient(KtoLoss(KtoConfig(**settings)), next(iter(source)), model)
    assert_same(made, expected)
    assert made[1].keys() - expected[1].keys() == set()
    others = {"logits/chosen", "logits/rejected", "entropy", "num_tokens"}
    assert expected[1].keys() - made[1].keys() == others | ({"kl"} if "loss" in settings else set())


def test_defaults_are_those_of_trl() -> None:
    from trl import KTOConfig as TrlConfig

    theirs, ours = TrlConfig.__dataclass_fields__, KtoConfig()
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        assert getattr(ours, name) == theirs[name].default
    assert ours.loss == theirs["loss_type"].default
