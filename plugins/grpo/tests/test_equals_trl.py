"""Advantages, loss, gradients and metrics equal those of TRL's trainers on the same completions."""

from __future__ import annotations

from typing import Any

import grpo_oracle as oracle
import pytest
import torch
from pegbox.rows import Batch, Extra
from pegbox.testing.tiny import collate
from pegbox.types import LossOutput, Outputs
from pegbox_grpo.advantages import decoupled_advantages, group_advantages, leave_one_out_advantages, weighted_sum
from pegbox_grpo.collecting import completion_figures, own_tokens, reward_figures
from pegbox_grpo.config import GrpoConfig
from pegbox_grpo.corrections import highest_entropy
from pegbox_grpo.loss import GrpoLoss
from pegbox_grpo.objectives import divergence
from pegbox_grpo.scoring import Rewards
from pegbox_grpo.trajectories import Trajectory, examples_of, with_rollouts

VALUES = torch.tensor([[float("nan") if v is None else v for v in row] for row in oracle.REWARDS], dtype=torch.float64)
WEIGHTS = torch.tensor(list(oracle.WEIGHTS.values()), dtype=torch.float64)
OTHERWISE = {"policy_loss", "entropy_coef"}
"""Where there is an entropy bonus: our terms are logged by their names, `grpo` and `entropy_bonus`."""
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo")
SEQUENCE = {"importance_sampling_level": "sequence"}
CASES: dict[str, dict[str, Any]] = {
    **{kind: {"loss_type": kind} for kind in TYPES},
    **{f"{kind} with reference": {"loss_type": kind, "beta": 0.3} for kind in TYPES},
    "luspo": {"loss_type": "luspo", **SEQUENCE},
    "gspo": {"loss_type": "grpo", **SEQUENCE, "epsilon": 0.05, "epsilon_high": 0.1},
    "gspo with reference": {"loss_type": "dapo", **SEQUENCE, "beta": 0.3},
    "cispo of completions": {"loss_type": "cispo", **SEQUENCE},
    "plain kl": {"beta": 0.3, "use_bias_correction_kl": False},
    "two bounds": {"epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided": {"epsilon": 0.1, "delta": 1.2},
    "two-sided below the bound": {"epsilon": 0.3, "delta": 1.1},
    "truncated masked": {"loss_type": "grpo", "mask_truncated": True, "beta": 0.1},
    "truncated masked in dr_grpo": {"loss_type": "dr_grpo", "mask_truncated": True},
    "off-policy mask": {"off_policy_mask_threshold": 0.05},
    "entropy bonus": {"entropy_coef": 0.01},
    "entropy mask": {"top_entropy_quantile": 0.3},
    "entropy mask and bonus": {"top_entropy_quantile": 0.5, "entropy_coef": 0.02, "loss_type": "grpo", "beta": 0.2},
    "scaled by the batch": {"scale_rewards": "batch"},
    "not scaled": {"scale_rewards": "none"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "gates": {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.7},
    "gamma": {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5},
}
THEIR_NAMES = {"mask_truncated": "mask_truncated_completions"}
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
METRICS = ("entropy", "kl", "cispo_clip_ratio", "vespo/phi_seq_mean", "sampling/sampling_logp_difference/mean")
METRICS += tuple(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))
METRICS += tuple(f"sampling/importance_sampling_ratio/{name}" for name in ("mean", "min", "max"))
METRICS += ("sampling/sampling_logp_difference/max", "clip_ratio/low_min", "clip_ratio/high_max")


def advantages_of(config: GrpoConfig, kl: torch.Tensor | None = None) -> torch.Tensor:
    if config.multi_objective_aggregation == "normalize_then_sum":
        return decoupled_advantages(VALUES, WEIGHTS, oracle.SAMPLES)[0]
    rewards = weighted_sum(VALUES, WEIGHTS)
    against = leave_one_out_advantages if config.advantage == "rloo" else group_advantages
    penalty = 0.0 if kl is None else config.beta * kl
    return against(rewards - penalty, oracle.SAMPLES, config.scale_rewards)[0]


def batch_of(
    config: GrpoConfig, fixed: oracle.Fixed, advantages: torch.Tensor, *, on_policy: bool
) -> tuple[Batch, Any]:
    """The completions as one batch, and which of the fixed tensors' places are trained."""
    mask = fixed.mask.clone()
    trajectories = []
    for b, rollout in enumerate(fixed.rollouts()):
        one = Trajectory.of(b, rollout, mask_truncated=config.mask_truncated)
        mask[b, : len(one.trained)] &= torch.tensor(one.trained)
        trajectories.append(one)
    kept = highest_entropy(fixed.entropies.detach()[mask], config.top_entropy_quantile)
    kept_BT = torch.zeros_like(mask).masked_scatter(mask, kept)
    made = []
    for b, one in enumerate(trajectories):
        old = tuple(fixed.old[b][mask[b]].tolist())
        values = {"old_logps": () if on_policy else old, "advantage": advantages[b].item()}
        if config.top_entropy_quantile < 1:
            values["kept"] = tuple(kept_BT[b][mask[b]].tolist())
        if config.importance_sampling_correction == "none":
            values["sampler_logps"] = ()
        made.append(Trajectory(**{**vars(one), **values}))
    batch = with_rollouts(collate(examples_of(made), tuple(range(len(made)))), made)
    reference = Extra(value=fixed.reference[mask], layout="trained")
    return Batch(**{**vars(batch), "extra": {**batch.extra, "reference_logps": reference}}), mask


def ours(config: GrpoConfig, fixed: oracle.Fixed, batch: Batch, mask: Any) -> tuple[torch.Tensor, LossOutput]:
    loss = GrpoLoss(config)
    counts = loss.counts(batch)
    output = loss(batch, Outputs(logps_N=fixed.logps[mask], entropy_N=fixed.entropies[mask]))
    value = sum(term.weight * term.total / counts[term.name] for term in output.terms)
    value.backward()
    return value.detach(), output


def compare(config: GrpoConfig, kind: str, settings: dict[str, Any], *, on_policy: bool) -> None:
    fixed, other = oracle.Fixed(), oracle.Fixed()
    correction = "none" if kind == "RLOO" else config.importance_sampling_correction
    trainer = oracle.trainer_of(kind, other, settings, on_policy=on_policy, correction=correction)
    advantages, value, metrics = oracle.run(trainer, on_policy=on_policy)
    kl = None
    if config.kl_placement == "reward":
        difference = divergence(fixed.old, fixed.reference, config.kl_estimator)
        kl = (difference * fixed.mask).sum(1).double()
    own = advantages_of(config, kl)
    torch.testing.assert_close(own.float(), advantages.float(), **CLOSE)
    batch, mask = batch_of(config, fixed, own, on_policy=on_policy)
    mine, output = ours(config, fixed, batch, mask)
    torch.testing.assert_close(mine, value, **CLOSE)
    for name in ("logps", "entropies"):
        left, right = getattr(fixed, name).grad, getattr(other, name).grad
        torch.testing.assert_close(
            torch.zeros(()) if left is None else left, torch.zeros(()) if right is None else right, **CLOSE
        )
    logged = {term.name: float(term.total) / float(term.count) for term in output.metrics}
    if kl is not None:
        logged["kl"] = float(kl.sum()) / float(mask.sum())
    shared = [name for name in METRICS if name in metrics and name in logged]
    assert {"entropy"} <= set(shared)
    assert {name for name in METRICS if name in metrics} == {name for name in METRICS if name in logged}
    for name in shared:
        assert logged[name] == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    on_the_host = {"num_tokens", "reward", "reward_std", "frac_reward_zero_std"}
    rest = {name for name in metrics if not name.startswith(("completions/", "rewards/"))} - on_the_host - set(shared)
    assert rest <= OTHERWISE, "every figure of TRL's is compared, here or with rewards and lengths"


@pytest.mark.parametrize("on_policy", [False, True], ids=["old", "on-policy"])
@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_metrics_equal_trls(name: str, on_policy: bool) -> None:
    case = CASES[name]
    cispo = {"epsilon_high": 5.0} if case.get("loss_type") == "cispo" else {}
    config = GrpoConfig(
        max_completion_length=oracle.LONGEST,
        **{"importance_sampling_correction": "none", "importance_sampling_clip_max": 3.0, **case, **cispo},
    )
    settings = {THEIR_NAMES.get(key, key): value for key, value in {**case, **cispo}.items()}
    compare(config, "GRPO", settings, on_policy=on_policy)


@pytest.mark.parametrize("mode", CORRECTIONS)
@pytest.mark.parametrize("kind", ["dapo", "vespo", "grpo"])
def test_correction_between_sampler_and_trainer_equals_trls(kind: str, mode: str) -> None:
    bounds = {"importance_sampling_clip_max": 1.2, "importance_sampling_clip_min": 0.8}
    config = GrpoConfig(
        max_completion_length=oracle.LONGEST,
        loss_type=kind,
        importance_sampling_correction=mode,
        off_policy_mask_threshold=0.1,
        **bounds,
    )
    settings = {"loss_type": kind, "off_policy_mask_threshold": 0.1}
    settings |= {f"vllm_{key}": value for key, value in bounds.items()}
    compare(config, "GRPO", settings, on_policy=False)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_rloo_equals_trls(beta: float, normalize: bool) -> None:
    penalty = {"beta": beta, "kl_placement": "reward", "kl_estimator": "k1"} if beta else {}
    config = GrpoConfig(
        max_completion_length=oracle.LONGEST,
        loss_type="rloo",
        advantage="rloo",
        scale_rewards="batch" if normalize else "none",
        importance_sampling_correction="none",
        **penalty,
    )
    compare(config, "RLOO", {"beta": beta, "normalize_advantages": normalize}, on_policy=False)


@pytest.mark.parametrize("scale", ["group", "batch", "none", "gdpo"])
def test_figures_of_rewards_and_lengths_equal_trls(scale: str) -> None:
    gdpo = {"multi_objective_aggregation": "normalize_then_sum"}
    settings = gdpo if scale == "gdpo" else {"scale_rewards": scale}
    fixed = oracle.Fixed()
    trainer = oracle.trainer_of("GRPO", fixed, settings, on_policy=True, correction="none")
    metrics = oracle.run(trainer, on_policy=True)[2]
    rewards = weighted_sum(VALUES, WEIGHTS)
    if scale == "gdpo":
        std = decoupled_advantages(VALUES, WEIGHTS, oracle.SAMPLES)[1]
    else:
        std = group_advantages(rewards, oracle.SAMPLES, scale)[1]
    named = Rewards(tuple(oracle.WEIGHTS), VALUES, WEIGHTS)
    figures = {
        name: total / count for name, (total, count) in reward_figures(named, rewards, std, oracle.SAMPLES).items()
    }
    assert {f"rewards/{name}/{what}" for name in oracle.WEIGHTS for what in ("mean", "std")} < figures.keys()
    for name, value in figures.items():
        assert value == pytest.approx(metrics[name], rel=1e-5, abs=1e-6), name
    lengths = completion_figures(fixed.rollouts())
    assert lengths["completions/clipped_ratio"] == (2.0, 6.0)
    assert lengths.keys() == {name for name in metrics if name.startswith("completions/")}
    for name, (total, count) in lengths.items():
        assert total / count == pytest.approx(metrics[name]), name
    assert sum(len(one.prompt) + own_tokens(one) for one in fixed.rollouts()) == metrics["num_tokens"]


def test_a_token_that_the_sampler_cannot_score_is_not_corrected() -> None:
    config = GrpoConfig(max_completion_length=oracle.LONGEST, off_policy_mask_threshold=0.1)
    fixed = oracle.Fixed()
    fixed.sampler[1, 2] = float("nan")
    other = oracle.Fixed()
    other.sampler[1, 2] = float("nan")
    settings = {"off_policy_mask_threshold": 0.1}
    trainer = oracle.trainer_of("GRPO", other, settings, on_policy=False, correction="sequence_mask")
    advantages, value, metrics = oracle.run(trainer, on_policy=False)
    batch, mask = batch_of(config, fixed, advantages, on_policy=False)
    mine, output = ours(config, fixed, batch, mask)
    torch.testing.assert_close(mine, value, **CLOSE)
    torch.testing.assert_close(fixed.logps.grad, other.logps.grad, **CLOSE)
    name = "sampling/sampling_logp_difference/mean"
    (term,) = (term for term in output.metrics if term.name == name)
    assert float(term.total) / float(term.count) == pytest.approx(metrics[name], rel=1e-5)


def test_estimators_of_the_divergence_follow_their_equations() -> None:
    policy, reference = torch.tensor([-1.0, -0.2]), torch.tensor([-0.5, -1.2])
    d = policy - reference
    torch.testing.assert_close(divergence(policy, reference, "k1"), d)
    torch.testing.assert_close(divergence(policy, reference, "k2"), d**2 / 2)
    torch.testing.assert_close(divergence(policy, reference, "k3"), torch.exp(reference - policy) - 1 + d)
