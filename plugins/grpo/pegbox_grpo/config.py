"""The section `grpo` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "rloo"]
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "rloo")
"""Loss types that clip the ratio of probabilities on both sides."""
CISPO_EPSILON_HIGH = 5.0


class GrpoConfig(Section):
    """How completions are sampled, what their rewards become, and what is learnt from them."""

    samples: int = setting(8, "Completions of each prompt: the group that a reward is compared with.", ge=2)
    max_completion_length: int = setting(512, "Longest completion.", unit="tokens", ge=1)
    temperature: float = setting(
        1.0, "Divides the logits, in sampling and in the probabilities that are learnt from.", unit="1", gt=0
    )
    top_p: float = setting(1.0, "Sample from the likeliest tokens of this probability.", unit="1", gt=0, le=1)
    top_k: int = setting(0, "Sample from so many of the likeliest tokens; 0 means all.", unit="tokens", ge=0)
    min_p: float = setting(
        0.0, "Sample from tokens with at least this share of the likeliest token's probability.", unit="1", ge=0, le=1
    )
    repetition_penalty: float = setting(
        1.0, "Divides the logits of tokens that occurred; 1 changes nothing.", unit="1", gt=0
    )
    stop: tuple[str, ...] = setting((), "Texts that end a completion.")
    stop_ids: tuple[int, ...] = setting((), "Token ids that end a completion, besides the model's own.")
    max_staleness: int = setting(
        0, "How many versions of the weights a completion may lag behind when it arrives.", unit="steps", ge=0
    )
    rollout_func: str | None = setting(
        None,
        "`module:function` or `file.py:function` that makes the rollouts of a request, in place of an engine.",
        pattern=r"^[^:]+:[\w.]+$",
    )

    steps_per_generation: int = setting(
        1, "Optimizer steps into which the completions of one generation are divided.", unit="steps", ge=1
    )
    iterations: int = setting(1, "How often each completion is learnt from (mu of the paper).", ge=1)
    loss_type: LossType = setting("dapo", "The objective and how it is averaged; see the README.")
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token", "One ratio of probabilities for each token, or one for a whole completion (GSPO)."
    )
    epsilon: float = setting(0.2, "How far below 1 the ratio may fall before it is clipped.", unit="1", gt=0, lt=1)
    epsilon_high: float | None = setting(
        None, "How far above 1; null: as `epsilon`. Of `cispo` the largest ratio itself; null: 5.", unit="1", gt=0
    )
    delta: float | None = setting(
        None, "Largest ratio where the advantage is negative too (two-sided clipping).", unit="1", gt=0
    )
    sapo_temperature_pos: float = setting(1.0, "Steepness of the soft gate, positive advantages.", unit="1", gt=0)
    sapo_temperature_neg: float = setting(1.05, "Steepness of the soft gate, other advantages.", unit="1", gt=0)
    vespo_k_pos: float = setting(2.0, "Power of the weight, advantages from 0 on.", unit="1", ge=0)
    vespo_lambda_pos: float = setting(3.0, "Decay of the weight, advantages from 0 on.", unit="1", gt=0)
    vespo_k_neg: float = setting(3.0, "Power of the weight, negative advantages.", unit="1", ge=0)
    vespo_lambda_neg: float = setting(2.0, "Decay of the weight, negative advantages.", unit="1", gt=0)

    advantage: Literal["group", "rloo"] = setting(
        "group", "What a reward is compared with: the mean of its group, or of the others in it (leave-one-out)."
    )
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group", "Which standard deviation divides advantages; with `rloo` batch or none."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = setting(
        "sum_then_normalize", "Add rewards, then normalise; or normalise each within its group, then add (GDPO)."
    )
    mask_truncated: bool = setting(False, "Learn nothing from completions that were cut at the longest length.")

    beta: float = setting(0.0, "Weight of the KL divergence from the reference; 0 needs no reference.", unit="1", ge=0)
    kl_estimator: Literal["k1", "k2", "k3"] = setting("k3", "How the divergence of a token is estimated.")
    kl_placement: Literal["loss", "reward"] = setting(
        "loss", "Where the divergence counts: in the loss of each token, or in the reward of a completion (RLOO)."
    )
    use_bias_correction_kl: bool = setting(
        True, "Multiply the divergence by the ratio of probabilities, so that its gradient is that of the sampler's."
    )

    entropy_coef: float = setting(0.0, "Weight of the mean entropy of tokens, which is added as a bonus.", unit="1")
    top_entropy_quantile: float = setting(
        1.0, "Learn from this share of tokens, those of the highest entropy.", unit="1", ge=0, le=1
    )
    log_entropy: bool = setting(True, "Log the entropy of tokens; the plain head needs memory for it.")

    importance_sampling_correction: Correction = setting(
        "sequence_mask", "What becomes of the ratio between trainer and sampler, of tokens or of a whole completion."
    )
    importance_sampling_clip_max: float | None = setting(
        3.0, "Ratios above it are cut to it (truncate), or not learnt from (mask).", unit="1", gt=0
    )
    importance_sampling_clip_min: float | None = setting(None, "The same, for ratios below it.", unit="1", ge=0)
    off_policy_mask_threshold: float | None = setting(
        None, "Leave out completions of negative advantage whose mean divergence from the sampler is larger.", gt=0
    )

    eval_samples: int = setting(1, "Completions of each held-out prompt.", ge=1)
    eval_temperature: float = setting(0.0, "Temperature for them; 0 takes the likeliest token.", unit="1", ge=0)
    eval_batch: int = setting(64, "Held-out prompts that are completed together.", unit="prompts", ge=1)
    completions: int = setting(
        16, "Completions of each generation that are written to completions.jsonl.", unit="completions", ge=0
    )

    @property
    def updates(self) -> int:
        """Optimizer steps that follow each generation."""
        return self.steps_per_generation * self.iterations

    @property
    def clip_high(self) -> float:
        """The upper bound as the objective takes it: above 1, or for `cispo` the bound itself."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return CISPO_EPSILON_HIGH if self.loss_type == "cispo" else self.epsilon

    @model_validator(mode="after")
    def _fits(self) -> GrpoConfig:
        for problem in (*self._of_the_objective(), *self._of_the_rewards(), *self._of_the_corrections()):
            raise ValueError(problem)
        return self

    def _of_the_objective(self) -> list[str]:
        wrong, kind = [], self.loss_type
        if kind == "luspo" and self.importance_sampling_level != "sequence":
            wrong.append("loss_type luspo weighs ratios of completions; set importance_sampling_level to sequence")
        if kind in ("vespo", "rloo") and self.importance_sampling_level == "sequence":
            wrong.append(f"loss_type {kind} has its own ratio of completions; remove importance_sampling_level")
        if self.delta is not None and kind not in CLIPPED:
            wrong.append(f"delta is {self.delta}, but loss_type {kind} does not clip on two sides; remove delta")
        if kind not in CLIPPED and self.epsilon != _default("epsilon"):
            wrong.append(f"epsilon is {self.epsilon}, but loss_type {kind} has no lower bound; remove epsilon")
        if kind in ("sapo", "vespo") and self.epsilon_high is not None:
            wrong.append(f"epsilon_high is {self.epsilon_high}, but loss_type {kind} does not clip; remove it")
        for other in ("sapo", "vespo"):
            keys = [key for key in type(self).model_fields if key.startswith(f"{other}_")]
            changed = [key for key in keys if getattr(self, key) != _default(key)]
            if changed and kind != other:
                wrong.append(f"{changed[0]} is set, but loss_type is {kind}, not {other}; remove it")
        return wrong

    def _of_the_rewards(self) -> list[str]:
        wrong = []
        if self.advantage == "rloo" and self.scale_rewards == "group":
            wrong.append("scale_rewards is group, but advantage rloo is scaled by the batch or not; set none or batch")
        if self.multi_objective_aggregation == "normalize_then_sum" and (
            self.advantage != "group" or self.scale_rewards != "group" or self.kl_placement == "reward"
        ):
            wrong.append(
                "multi_objective_aggregation normalize_then_sum normalises by itself; "
                "set advantage and scale_rewards to group, kl_placement to loss"
            )
        if self.beta == 0 and (self.kl_placement == "reward" or self.kl_estimator != "k3"):
            wrong.append("kl_placement or kl_estimator is set, but beta is 0: there is no divergence; set beta")
        return wrong

    def _of_the_corrections(self) -> list[str]:
        wrong = []
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            wrong.append(f"importance_sampling_clip_min {low} is not below importance_sampling_clip_max {high}")
        if self.importance_sampling_correction == "none" and (low is not None or high != 3.0):
            wrong.append("importance_sampling_clip_* is set, but importance_sampling_correction is none; remove it")
        if self.importance_sampling_correction != "none" and low is None and high is None:
            wrong.append("importance_sampling_correction has no bound; set importance_sampling_clip_max, or none")
        return wrong


def _default(key: str) -> object:
    return GrpoConfig.model_fields[key].default
