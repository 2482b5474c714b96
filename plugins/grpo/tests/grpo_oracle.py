"""TRL's trainers on fixed completions: their own methods compute advantages, ratios, loss and metrics.

Generation, rewards and the model's forward are fixed tensors, so that nothing but the methods is compared. Six
completions of two prompts, of different lengths, two of them cut off.

    B  completions    T  tokens of the longest one
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from pegbox.rollouts import Rollout
from pegbox.testing.tiny import EOS, PAD, ByteTokenizer
from torch import Tensor, nn

SAMPLES, LONGEST = 3, 7
LENGTHS = (7, 4, 1, 5, 7, 3)
FINISHED = (True, True, True, True, False, False)
REWARDS = ((1.0, 0.5, None), (0.0, 0.3, 0.2), (0.0, 0.9, 0.1), (2.0, None, 0.4), (0.5, 0.2, 0.3), (0.1, 0.2, None))
WEIGHTS = {"first": 1.0, "second": 0.5, "third": 2.0}


def random(seed: int, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(LENGTHS), LONGEST, generator=generator) * (high - low) + low


@dataclass
class Fixed:
    """The fixed tensors, `_BT`; the current log-probabilities and the entropies are what gradients are taken of."""

    logps: Tensor = field(default_factory=lambda: random(1, -2.0, -0.2).requires_grad_())
    entropies: Tensor = field(default_factory=lambda: random(2, 0.1, 3.0).requires_grad_())
    old: Tensor = field(default_factory=lambda: random(1, -2.0, -0.2) + random(3, -0.6, 0.6))
    reference: Tensor = field(default_factory=lambda: random(1, -2.0, -0.2) + random(4, -0.5, 0.5))
    sampler: Tensor = field(default_factory=lambda: random(5, -0.4, 0.4))

    def __post_init__(self) -> None:
        self.mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
        self.sampler = self.old + self.sampler

    def rollouts(self) -> list[Rollout]:
        made = []
        for b, (length, finished) in enumerate(zip(LENGTHS, FINISHED, strict=True)):
            ids = tuple(range(65 + b, 65 + b + length - 1)) + ((EOS,) if finished else (90,))
            made.append(
                Rollout(
                    prompt=(70, 71, 72)[: 2 + b // SAMPLES],
                    completion=ids,
                    logps=tuple(self.sampler[b, :length].tolist()),
                    first_version=0,
                    last_version=0,
                    finished=finished,
                )
            )
        return made


class Frozen(nn.Module):
    """Stands for the model; its forward is never called."""

    is_gradient_checkpointing = False


def fixture_of(base: Any, kind: str, fixed: Fixed, *, on_policy: bool, correction: str) -> Any:
    """A class of TRL whose generation, rewards and forward are fixed."""

    class Fixture(base):  # type: ignore[misc,valid-type]
        def _generate(self, prompts: Any) -> Any:
            if kind == "GRPO":
                return super()._generate(prompts)
            rollouts = fixed.rollouts()
            return [list(r.prompt) for r in rollouts], [list(r.completion) for r in rollouts], ["text"] * len(rollouts)

        def rollout_func(self, *_: Any) -> dict[str, Any]:
            rollouts = fixed.rollouts()
            return {
                "prompt_ids": [list(r.prompt) for r in rollouts],
                "completion_ids": [list(r.completion) for r in rollouts],
                "logprobs": [list(r.logps) for r in rollouts] if correction != "none" else None,
            }

        def _calculate_rewards(self, *_: Any) -> Tensor:
            return torch.tensor([[float("nan") if v is None else v for v in row] for row in REWARDS])

        def _get_per_token_logps_and_entropies(self, model: Any, *_: Any, **__: Any) -> Any:
            if model is self.ref_model:
                return fixed.reference, None, None
            if self.scoring:
                return (fixed.logps.detach() if on_policy else fixed.old), None, None
            return fixed.logps, fixed.entropies, None

    return Fixture


def trainer_of(kind: str, fixed: Fixed, settings: dict[str, Any], *, on_policy: bool, correction: str) -> Any:
    """A trainer of TRL whose model, generation and rewards are fixed.

    Args:
        on_policy: one update for each generation: the old log-probabilities are the current ones.
        correction: of TRL's modes, or `none`.
    """
    import trl

    config_type, base = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    arguments = config_type(
        output_dir="/dev/null",
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(LENGTHS),
        num_generations=SAMPLES,
        max_completion_length=LONGEST,
        reward_weights=list(WEIGHTS.values()),
        gradient_checkpointing=False,
        **settings,
    )

    fixture = fixture_of(base, kind, fixed, on_policy=on_policy, correction=correction)
    trainer = fixture.__new__(fixture)
    values = vars(arguments)
    for name in ("beta", "temperature", "scale_rewards", "loss_type", "importance_sampling_level", "num_iterations"):
        setattr(trainer, name, values.get(name))
    for name in ("multi_objective_aggregation", "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy"):
        setattr(trainer, name, values.get(name))
    for name in ("off_policy_mask_threshold", "mask_truncated_completions", "max_completion_length", "num_generations"):
        setattr(trainer, name, values.get(name))
    for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "reward_clip_range"):
        setattr(trainer, name, values.get(name))
    trainer.args, trainer.accelerator, trainer.model = arguments, Accelerator(cpu=True), Frozen().train()
    trainer.ref_model = Frozen()
    trainer.epsilon_low = arguments.epsilon
    trainer.epsilon_high = arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high
    trainer.normalize_advantages = values.get("normalize_advantages")
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = correction != "none"
    trainer.vllm_importance_sampling_mode = correction
    trainer._entropy_bonus_enabled = values.get("entropy_coef") not in (None, 0.0)
    # One update for each generation is what TRL sees in one step per generation and one accumulated batch.
    trainer.current_gradient_accumulation_steps = 1
    trainer.reward_weights = torch.tensor(list(WEIGHTS.values()))
    trainer.reward_funcs = trainer.reward_func_names = list(WEIGHTS)
    trainer.eos_token_ids, trainer._tokenizer = [EOS], ByteTokenizer()
    assert trainer._tokenizer.pad_token_id == PAD
    trainer.pad_to_multiple_of = trainer.environment_factories = trainer.environments = trainer.tools = None
    trainer._is_vlm = trainer.aux_loss_enabled = False
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._logs = defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list))
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    trainer.num_iterations = 1 if on_policy else 2
    trainer.scoring = True
    trainer.state, trainer._last_loaded_step = SimpleNamespace(global_step=0, num_input_tokens_seen=0), 0
    trainer.processing_class = SimpleNamespace(batch_decode=lambda ids, **_: ["text"] * len(ids))
    return trainer


def run(trainer: Any, *, on_policy: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Advantages, loss, and metrics by name; gradients are in the fixed tensors."""
    inputs = trainer._generate_and_score_completions([{"prompt": "x"}] * len(LENGTHS))
    if on_policy and not trainer.use_vllm:
        inputs.pop("old_per_token_logps", None)
    trainer.scoring = False
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return inputs["advantages"], loss.detach(), {name: values[-1] for name, values in trainer._metrics["train"].items()}
