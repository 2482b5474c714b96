"""One generation: prompts in, trajectories with advantages out, the same on every rank.

generate    weights are synced, completions sampled                        engine.py
score       each rank scores its part, all get all                         scoring.py
measure     where it is needed, one forward of the policy before the first update: its log-probabilities for later
            updates, entropies for the mask of tokens, the divergence where it counts in the reward
advantages  of each completion within its group                            advantages.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from pegbox.errors import DataError, RunError
from pegbox.rollouts import Rollout, Sampling
from pegbox.rows import Batch, Example, RowSource, Split

from pegbox_grpo.advantages import decoupled_advantages, group_advantages, leave_one_out_advantages, weighted_sum
from pegbox_grpo.corrections import highest_entropy
from pegbox_grpo.engine import Engine
from pegbox_grpo.figures import Figures, mean_of
from pegbox_grpo.names import REFERENCE_LOGPS
from pegbox_grpo.objectives import divergence
from pegbox_grpo.refusals import require_prompt
from pegbox_grpo.scoring import Rewards, score
from pegbox_grpo.trajectories import Trajectory, by_trajectory, examples_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model, Need
    from torch import Tensor, nn

    from pegbox_grpo.config import GrpoConfig

Rows = Sequence[tuple[int, Example]]
Parts = Sequence[Sequence[int]]
"""For each optimizer step the positions of its trajectories."""


@dataclass(frozen=True)
class Collected:
    """One generation.

    Attributes:
        trajectories: scored and measured, in the order of the request.
        parts: which of them each optimizer step takes.
        layouts: this rank's micro-batches of some parts, laid out already.
        figures: what is logged.
    """

    trajectories: tuple[Trajectory, ...]
    parts: Parts
    layouts: Mapping[int, Sequence[Batch]]
    figures: Figures
    rollouts: tuple[Rollout, ...]
    rewards: Rewards


class Collector:
    """Makes generations for the training and the evaluation source of a run."""

    def __init__(self, ctx: Context, model: Model, source: RowSource, config: GrpoConfig) -> None:
        self.ctx, self.model, self.source, self.config = ctx, model, source, config
        self.engine = Engine(ctx, model, config)

    def collect(self, rows: Rows, split: Split, seed: int, version: int, parts_of: int = 1) -> Collected:
        """Complete, score and measure the prompts of some rows.

        Args:
            seed: of the sampling.
            version: of the weights: optimizer steps made.
            parts_of: optimizer steps into which the completions are divided.
        """
        training = split == "train"
        samples = self.config.samples if training else self.config.eval_samples
        for number, example in rows:
            require_prompt(example, lambda number=number: self.source.describe(_nothing(number)))
        began = time.perf_counter()
        with self.ctx.phase("generate"):
            self.engine.sync(version)
            rollouts = self.engine.generate(
                [tuple(map(int, example.input_ids)) for _, example in rows],
                [example.columns for _, example in rows],
                samples,
                self._sampling(training, seed),
                split,
            )
        generated = time.perf_counter()
        rewards = score(self.ctx, rollouts, samples)
        scored = time.perf_counter()
        numbers = [number for number, _ in rows for _ in range(samples)]
        plain = [
            Trajectory.of(number, rollout, mask_truncated=self.config.mask_truncated and training)
            for number, rollout in zip(numbers, rollouts, strict=True)
        ]
        if not training:
            # Sampled at a temperature of its own: nothing says how far sampler and trainer are apart.
            plain = [replace(one, sampler_logps=()) for one in plain]
        parts = divided(len(plain), parts_of, seed)
        if training:
            _require_trained(plain, parts)
        with self.ctx.phase("learn"):
            trajectories, layouts, kl_R = self._measured(plain, parts, training)
        advantages_R, std_R, rewards_R = self._advantages(rewards, samples, kl_R)
        trajectories = [
            replace(one, advantage=value) for one, value in zip(trajectories, advantages_R.tolist(), strict=True)
        ]
        figures = {
            **reward_figures(rewards, rewards_R, std_R, samples),
            **completion_figures(rollouts),
            **({"kl": self._kl_figure(kl_R, plain)} if kl_R is not None else {}),
        }
        if training:
            figures |= {"generate_s": (generated - began, 1.0), "score_s": (scored - generated, 1.0)}
        return Collected(tuple(trajectories), parts, layouts, figures, rollouts, rewards)

    def _sampling(self, training: bool, seed: int) -> Sampling:
        config = self.config
        return Sampling(
            max_tokens=config.max_completion_length,
            temperature=config.temperature if training else config.eval_temperature,
            top_p=config.top_p if training or config.eval_temperature else 1.0,
            top_k=config.top_k if training or config.eval_temperature else 0,
            min_p=config.min_p if training or config.eval_temperature else 0.0,
            repetition_penalty=config.repetition_penalty,
            stop=config.stop,
            stop_ids=config.stop_ids,
            seed=seed,
        )

    # ---- the forward before the first update ----

    def _measured(
        self, plain: Sequence[Trajectory], parts: Parts, training: bool
    ) -> tuple[list[Trajectory], dict[int, list[Batch]], Tensor | None]:
        """Trajectories with what the policy says of them, the layouts used, and the divergence of each completion."""
        config = self.config
        old, kept = training and config.updates > 1, training and config.top_entropy_quantile < 1
        kl = config.beta > 0 and config.kl_placement == "reward"
        found: dict[str, dict[int, list[float]]] = {"logps": {}, "entropy": {}, "kl": {}}
        layouts: dict[int, list[Batch]] = {}
        if not (old or kept or kl):
            return list(plain), layouts, None
        needs: frozenset[Need] = frozenset({"logps", "entropy"} if kept else {"logps"})
        with frozen(self.model.module):
            for index, part in enumerate(parts):
                layouts[index] = list(self.source.lay_out(examples_of([plain[at] for at in part])))
                for batch in layouts[index]:
                    self._measure(batch, part, needs, found, kl=kl)
        gathered = {name: self._gathered(values) for name, values in found.items()}
        made = list(plain)
        for part in parts:
            threshold_mask = self._kept_tokens([gathered["entropy"][at] for at in part]) if kept else []
            for place, at in enumerate(part):
                made[at] = replace(
                    made[at],
                    old_logps=tuple(gathered["logps"][at]) if old else (),
                    kept=threshold_mask[place] if kept else (),
                )
        sums_R = [sum(gathered["kl"][at]) for at in range(len(plain))] if kl else None
        return made, layouts, None if sums_R is None else torch.tensor(sums_R, dtype=torch.float64)

    def _measure(
        self,
        batch: Batch,
        part: Sequence[int],
        needs: frozenset[Need],
        found: Mapping[str, dict[int, list[float]]],
        *,
        kl: bool,
    ) -> None:
        assert self.model.forward is not None, "the model was placed"
        placed = batch.to(self.ctx.runtime.device)
        outputs = self.model.forward(placed, needs)
        assert outputs.logps_N is not None, "asked for"
        values = {"logps": outputs.logps_N, "entropy": outputs.entropy_N}
        if kl:
            if REFERENCE_LOGPS not in placed.extra:
                raise DataError(
                    "batches of rollouts are laid out without reference log-probabilities",
                    "grpo.kl_placement is reward: they are needed before the loss.",
                    "List reference before grpo in plugins.",
                )
            reference_N = placed.extra[REFERENCE_LOGPS].value.float()
            values["kl"] = divergence(outputs.logps_N.float(), reference_N, self.config.kl_estimator)
        for name, values_N in values.items():
            if values_N is not None:
                positions = by_trajectory(batch, values_N.float())
                found[name].update({part[at]: numbers for at, numbers in positions.items()})

    def _gathered(self, own: dict[int, list[float]]) -> dict[int, list[float]]:
        every: list[dict[int, list[float]]] = self.ctx.runtime.gather_objects(own)  # type: ignore[assignment]
        return {at: numbers for part in every for at, numbers in part.items()}

    def _kept_tokens(self, entropies: Sequence[Sequence[float]]) -> list[tuple[bool, ...]]:
        """The tokens of one step that are learnt from: those of the highest entropy among all of them."""
        joined = torch.tensor([value for one in entropies for value in one])
        kept = highest_entropy(joined, self.config.top_entropy_quantile)
        return [tuple(part.tolist()) for part in kept.split([len(one) for one in entropies])]

    # ---- rewards ----

    def _advantages(self, rewards: Rewards, samples: int, kl_R: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages, the standard deviations that belong to them, and the rewards as they are logged."""
        config = self.config
        rewards_R = weighted_sum(rewards.values_RK, rewards.weights_K)
        if config.multi_objective_aggregation == "normalize_then_sum":
            return *decoupled_advantages(rewards.values_RK, rewards.weights_K, samples), rewards_R
        penalized_R = rewards_R if kl_R is None else rewards_R - config.beta * kl_R
        compare = leave_one_out_advantages if config.advantage == "rloo" else group_advantages
        return *compare(penalized_R, samples, config.scale_rewards), rewards_R

    @staticmethod
    def _kl_figure(kl_R: Tensor, trajectories: Sequence[Trajectory]) -> tuple[float, float]:
        """The mean divergence of a token."""
        return float(kl_R.sum()), float(sum(sum(one.trained) for one in trajectories))


def divided(count: int, parts: int, seed: int) -> list[list[int]]:
    """Positions of completions for each of several steps: shuffled, unless there is one, and of like number.

    Raises:
        DataError: there are fewer completions than steps.
    """
    if parts == 1:
        return [list(range(count))]
    if count < parts:
        raise DataError(
            f"a generation of {count} completions cannot be divided into {parts} optimizer steps",
            "A step without a completion has nothing to learn from.",
            "Lower grpo.steps_per_generation, or raise trainer.batch.",
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[count * part // parts : count * (part + 1) // parts] for part in range(parts)]


def _require_trained(trajectories: Sequence[Trajectory], parts: Parts) -> None:
    """Refuse a step from which nothing could be learnt."""
    for part in parts:
        if not any(any(trajectories[at].trained) for at in part):
            raise RunError(
                f"none of the {len(part)} completions of a step has a token that is learnt from",
                "All were cut at grpo.max_completion_length while grpo.mask_truncated is set, or are not the model's.",
                "Raise grpo.max_completion_length, or set grpo.mask_truncated to false.",
            )


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Without gradients, in evaluation mode; afterwards each part of the module is in the mode it was in."""
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in trained:
            part.training = True


def reward_figures(rewards: Rewards, rewards_R: Tensor, std_R: Tensor, samples: int) -> dict[str, tuple[float, float]]:
    """Means and standard deviations of rewards, as they are logged.

    Args:
        rewards_R: weighed sums; `std_R`: the deviations that their advantages were compared with.
    """
    figures: dict[str, tuple[float, float]] = {}
    for k, name in enumerate(rewards.names):
        applies = rewards.values_RK[:, k][~rewards.values_RK[:, k].isnan()]
        figures[f"rewards/{name}/mean"] = mean_of(applies.tolist())
        if len(applies) > 1:
            figures[f"rewards/{name}/std"] = float(applies.std()), 1.0
    figures["reward"] = mean_of(rewards_R.tolist())
    if len(rewards_R) > 1:
        figures["reward_std"] = float(rewards_R.std()), 1.0
    if samples > 1:
        figures["frac_reward_zero_std"] = mean_of(torch.isclose(std_R, torch.zeros_like(std_R)).double().tolist())
    return figures


def own_tokens(rollout: Rollout) -> int:
    """Tokens of a completion that the model sampled."""
    return sum(rollout.trained) if rollout.trained else len(rollout.completion)


def completion_figures(rollouts: Sequence[Rollout]) -> dict[str, tuple[float, float]]:
    """Lengths of completions, as they are logged: tokens of the model, not those of tools or an environment."""
    tokens = [own_tokens(rollout) for rollout in rollouts]
    ended = [own_tokens(rollout) for rollout in rollouts if rollout.finished]
    figures = {
        "completions/mean_length": mean_of(tokens),
        "completions/min_length": (float(min(tokens)), 1.0),
        "completions/max_length": (float(max(tokens)), 1.0),
        "completions/clipped_ratio": (float(len(tokens) - len(ended)), float(len(tokens))),
    }
    if ended:
        figures["completions/mean_terminated_length"] = mean_of(ended)
        figures["completions/min_terminated_length"] = float(min(ended)), 1.0
        figures["completions/max_terminated_length"] = float(max(ended)), 1.0
    return figures


def _nothing(number: int) -> Batch:
    """A batch that knows of one row only, to have it named."""
    empty = torch.empty(0, dtype=torch.int64)
    return Batch(input_ids_BT=empty, targets_BT=empty, trained_N=empty, rows=(number,))
