"""On the same rollouts a run makes the steps of TRL's GRPOTrainer: losses, figures and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_rl
import torch
from pegbox.hooks import hookimpl
from pegbox.rollouts import RolloutBatch, Score
from tiny_rl import EOS, VOCABULARY, WANTED, Plugin, config_of, records, run

STEPS, SAMPLES, PROMPTS, LONGEST = 4, 4, 4, 5


class Recording(Plugin):
    """Keeps what was sampled; one reward."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[RolloutBatch] = []

    @hookimpl
    def generate_rollouts(self, ctx: Any, request: Any) -> RolloutBatch:
        self.made.append(Plugin.generate_rollouts(self, ctx, request))
        return self.made[-1]

    @hookimpl
    def score_rollouts(self, ctx: Any, rollouts: RolloutBatch) -> list[Score]:
        return [Score(name="share", values_R=tuple(share_of(one.completion) for one in rollouts.rollouts))]


def share_of(completion: Any) -> float:
    return list(completion).count(WANTED) / len(completion) - 0.02 * len(completion)


def train_with_trl(folder: Path, made: list[RolloutBatch], settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token=f"t{EOS}")
    replayed = iter(made)

    def replay(prompts: Any, _: Any) -> dict[str, Any]:
        rollouts = next(replayed).rollouts
        assert len(prompts) == len(rollouts)
        return {
            "prompt_ids": [list(one.prompt) for one in rollouts],
            "completion_ids": [list(one.completion) for one in rollouts],
            "logprobs": None,
        }

    def share(completion_ids: Any, **_: Any) -> list[float]:
        return [share_of(ids) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=tiny_rl.build_model(),
        reward_funcs=share,
        rollout_func=replay,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": f"t{i % 20}"} for i in range(PROMPTS * STEPS)]),
        args=GRPOConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_generations=SAMPLES,
            max_completion_length=LONGEST,
            learning_rate=3e-3,
            weight_decay=0.0,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
            **settings,
        ),
    )
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"mask_truncated": True}, {"mask_truncated_completions": True}),
        ({"loss_type": "grpo", "iterations": 2}, {"loss_type": "grpo", "num_iterations": 2}),
    ],
    ids=["dapo", "dapo without truncated", "grpo twice"],
)
def test_a_run_makes_the_steps_of_trl(tmp_path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    recording = Recording()
    run(
        config_of(
            tmp_path / "ours",
            grpo={"max_completion_length": LONGEST, "importance_sampling_correction": "none", **ours},
            adamw={"weight_decay": 0.0},
            trainer={"max_steps": STEPS, "max_grad_norm": 1.0, "micro_batch": 3},
        ),
        recording,
    )
    trainer = train_with_trl(tmp_path / "theirs", recording.made, theirs)
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = records(tmp_path / "ours")
    assert len(history) == len(logged) == STEPS
    shared = {"loss", "grad_norm", "entropy", "reward", "reward_std", "rewards/share/mean", "frac_reward_zero_std"}
    shared |= {f"completions/{which}_length" for which in ("mean", "min", "max")} | {"num_tokens"}
    shared |= {"completions/clipped_ratio", *(f"completions/{which}_terminated_length" for which in ("min", "max"))}
    for left, right in zip(logged, history, strict=True):
        compared = shared & left.keys()
        if "mask_truncated" in ours:
            # TRL's is the mean over micro-batches, of which some have nothing left.
            compared -= {"entropy"}
        assert {"loss", "grad_norm"} <= compared
        expected = {name: float(right[name]) for name in compared}
        assert {name: left[name] for name in compared} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    start = tiny_rl.build_model()
    pairs = zip(recording.model.module.parameters(), trainer.model.parameters(), start.parameters(), strict=True)
    for one, other, first in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
        assert (one - first).abs().max() > 2e-3, "and training moved it far beyond the tolerance"
