"""The loss of online policy optimisation: one objective of many, averaged over one step, whatever its split.

    total = sum over completions D and their tokens N of  share x (objective + beta x divergence)
    count = what `loss_type` divides by, summed over the step before its first backward

| loss_type | objective | share of a token | count |
|---|---|---|---|
| grpo (arXiv:2402.03300, eq. 3) | clipped | 1 / tokens of its completion | completions |
| bnpo, dapo (arXiv:2503.14476, eq. 8) | clipped | 1 | tokens |
| dr_grpo (arXiv:2503.20783) | clipped | 1 | completions x max_completion_length |
| luspo (arXiv:2602.05261) | clipped, ratio of the completion | 1 | completions |
| cispo (arXiv:2506.13585) | clipped weight | 1 | tokens |
| sapo (arXiv:2511.20347) | soft gate | 1 / tokens of its completion | completions |
| vespo (arXiv:2602.10693) | gamma weight | 1 | tokens |
| rloo (arXiv:2402.14740) | clipped, ratio of the whole completion | 1 / tokens of its completion | completions |

`bnpo` divides by the tokens of a batch and `dapo` by those of the step; here a step is one batch, however it is split,
so they are one. Advantages come as one number for each completion (`Batch.extra["advantages"]`), log-probabilities of
the sampler, of the old policy and of the reference as one for each trained token. Without the old policy's the current
ones stand for them: right for the one update that follows a generation, and no second forward is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pegbox.errors import DataError
from pegbox.rows import Batch
from pegbox.types import LossOutput, Need, Outputs, Term

from pegbox_grpo import objectives
from pegbox_grpo.config import CLIPPED, GrpoConfig
from pegbox_grpo.corrections import bounded, log_weight, on_policy, sampler_ratio
from pegbox_grpo.documents import lengths, sums
from pegbox_grpo.figures import figures_of
from pegbox_grpo.names import ADVANTAGES, KEPT, OLD_LOGPS, REFERENCE_LOGPS, SAMPLER_LOGPS

if TYPE_CHECKING:
    from torch import Tensor

TERM, BONUS = "grpo", "entropy_bonus"
BY_TOKENS = ("bnpo", "dapo", "cispo", "vespo")
MEAN_OF_COMPLETION = ("grpo", "sapo", "rloo")


class GrpoLoss:
    """The term `grpo`, and `entropy_bonus` where `entropy_coef` is set; the field's figures as metrics."""

    scope: Literal["token", "batch"] = "token"

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
        self.kl_in_loss = config.beta > 0 and config.kl_placement == "loss"
        self.entropy_gradient = config.entropy_coef != 0
        self.needs: frozenset[Need] = frozenset(
            {"logps", "entropy"} if config.log_entropy or self.entropy_gradient else {"logps"}
        )
        self.extras = frozenset({ADVANTAGES, *([REFERENCE_LOGPS] if config.beta > 0 else [])})

    def counts(self, batch: Batch) -> Mapping[str, float]:
        """What the objective divides by, and the tokens whose entropy counts.

        Raises:
            DataError: the batch does not hold rollouts.
        """
        if ADVANTAGES not in batch.extra or batch.last_D is None or batch.document_N is None:
            raise DataError(
                "a batch of the loss grpo holds no advantages",
                "Its rows are plain rows of the data, and not rollouts.",
                "List grpo after the plugin that makes batches, or remove it from loss.",
            )
        if len(batch.extra[ADVANTAGES].value) != len(batch.last_D):
            raise DataError(
                f"a batch has {len(batch.last_D)} completions and {len(batch.extra[ADVANTAGES].value)} advantages",
                "Each completion has one.",
                "Remove the plugin that changes batches after grpo.",
            )
        bonus = {BONUS: float(_kept(batch))} if self.entropy_gradient else {}
        return {TERM: self._count(batch), **bonus}

    def _count(self, batch: Batch) -> float:
        assert batch.last_D is not None, "counts looked"
        completions = float(len(batch.last_D))
        if self.config.loss_type in BY_TOKENS:
            return float(batch.trained_tokens)
        return completions * self.config.max_completion_length if self.config.loss_type == "dr_grpo" else completions

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        """The terms and figures of one micro-batch; the device is not waited for."""
        assert outputs.logps_N is not None, "the loop provides every need"
        learnt = Learnt(self.config, batch, outputs.logps_N.float())
        loss_N = learnt.token_objectives()
        if self.kl_in_loss:
            loss_N = loss_N + self.config.beta * learnt.divergences()
        if self.config.loss_type in MEAN_OF_COMPLETION:
            loss_N = loss_N / learnt.lengths_D[learnt.document_N]
        terms = [Term(name=TERM, total=loss_N.sum(), count=self._count(batch))]
        metrics = [*figures_of(batch), *learnt.metrics]
        if outputs.entropy_N is not None:
            entropy_N = outputs.entropy_N.float()
            metrics.append(Term(name="entropy", total=entropy_N.detach().sum(), count=float(batch.trained_tokens)))
            if self.entropy_gradient:
                kept_N = entropy_N if learnt.kept_N is None else entropy_N * learnt.kept_N
                terms.append(Term(name=BONUS, total=kept_N.sum(), count=_kept(batch), weight=-self.config.entropy_coef))
        return LossOutput(terms=tuple(terms), metrics=tuple(metrics))


def _kept(batch: Batch) -> float | Tensor:
    """Tokens that are learnt from: all, or those of the highest entropy."""
    return float(batch.trained_tokens) if KEPT not in batch.extra else batch.extra[KEPT].value.sum()


class Learnt:
    """One micro-batch of rollouts under the current policy, N tokens of D completions, and figures about it.

    Attributes:
        ratio_N: probability now over that under the old policy, of the token or of its completion.
        metrics: filled by the methods.
    """

    def __init__(self, config: GrpoConfig, batch: Batch, logps_N: Tensor) -> None:
        assert batch.document_N is not None, "counts looked"
        self.config, self.logps_N, self.document_N = config, logps_N, batch.document_N
        self.advantages_D = batch.extra[ADVANTAGES].value.to(logps_N.dtype)
        self.advantages_N = self.advantages_D[self.document_N]
        self.completions = len(self.advantages_D)
        self.old_N = self._extra(batch, OLD_LOGPS)
        if self.old_N is None:
            self.old_N = logps_N.detach()
        self.sampler_N = self._extra(batch, SAMPLER_LOGPS)
        self.reference_N = self._extra(batch, REFERENCE_LOGPS)
        self.kept_N = self._extra(batch, KEPT)
        self.lengths_D = lengths(logps_N, self.document_N, self.completions)
        self.level: Literal["token", "sequence", "sum"] = (
            "sum" if config.loss_type == "rloo" else config.importance_sampling_level
        )
        self.ratio_N = self._log_ratios(self.level).exp()
        self.metrics: list[Term] = []

    def _extra(self, batch: Batch, name: str) -> Tensor | None:
        return batch.extra[name].value.to(self.logps_N.dtype) if name in batch.extra else None

    def _log_ratios(self, level: Literal["token", "sequence", "sum"]) -> Tensor:
        assert self.old_N is not None, "set above"
        return objectives.log_ratios(self.logps_N, self.old_N, self.document_N, self.completions, level)

    def token_objectives(self) -> Tensor:
        """The objective of each token, masked and corrected as the config says."""
        correction, of_tokens = self._correction()
        loss_N = self._plain_objective(correction, of_tokens)
        if self.config.off_policy_mask_threshold is not None:
            sampler_N = self.old_N if self.sampler_N is None else self.sampler_N
            assert sampler_N is not None, "set above"
            keep_D = on_policy(
                self.logps_N, sampler_N, self.advantages_D, self.document_N, self.config.off_policy_mask_threshold
            )
            self._log("off_policy_masked", 1 - keep_D)
            loss_N = loss_N * keep_D[self.document_N]
        if self.kept_N is not None:
            loss_N = loss_N * self.kept_N
        if correction is not None and self.config.loss_type != "vespo":
            loss_N = loss_N * (correction if of_tokens else correction[self.document_N])
        return loss_N

    def _plain_objective(self, correction: Tensor | None, of_tokens: bool) -> Tensor:
        config = self.config
        if config.loss_type in CLIPPED:
            self._log_clipping()
            return objectives.clipped_surrogate(
                self.ratio_N, self.advantages_N, config.epsilon, config.clip_high, config.delta
            )
        if config.loss_type == "cispo":
            self._log("cispo_clip_ratio", (self.ratio_N > config.clip_high) & (self.advantages_N > 0))
            return objectives.clipped_weight(self.ratio_N, self.advantages_N, self.logps_N, config.clip_high)
        if config.loss_type == "sapo":
            gates = config.sapo_temperature_pos, config.sapo_temperature_neg
            return objectives.soft_gate(self.ratio_N, self.advantages_N, *gates)
        log_w_D = log_weight(
            self._log_ratios("token"), correction, self.document_N, self.completions, of_tokens=of_tokens
        )
        phi_D = objectives.gamma_weight(
            log_w_D,
            self.advantages_D,
            (config.vespo_k_pos, config.vespo_lambda_pos),
            (config.vespo_k_neg, config.vespo_lambda_neg),
        )
        self._log("vespo/phi_seq_mean", phi_D)
        return -phi_D[self.document_N] * self.advantages_N * self.logps_N

    def divergences(self) -> Tensor:
        """The divergence of each token from the reference, with its gradient corrected where the config says so."""
        assert self.reference_N is not None, "extras ask for it"
        divergence_N = objectives.divergence(self.logps_N, self.reference_N, self.config.kl_estimator)
        if self.config.use_bias_correction_kl:
            divergence_N = divergence_N * self.ratio_N
        self._log("kl", divergence_N)
        return divergence_N

    def _correction(self) -> tuple[Tensor | None, bool]:
        """Ratios between trainer and sampler, of tokens or of completions, and which of the two."""
        how = self.config.importance_sampling_correction
        if how == "none" or self.sampler_N is None:
            return None, True
        assert self.old_N is not None, "set above"
        of_tokens = how.startswith("token")
        ratio = sampler_ratio(self.old_N, self.sampler_N, None if of_tokens else self.document_N, self.completions)
        low, high = self.config.importance_sampling_clip_min, self.config.importance_sampling_clip_max
        corrected = bounded(ratio, low, high, "truncate" if how.endswith("truncate") else "mask")
        self._log("sampling/importance_sampling_ratio/mean", corrected)
        gap_N = (self.old_N - self.sampler_N).abs()
        known_N = ~gap_N.isnan()
        gap_N = gap_N.nan_to_num(nan=0.0)
        name = "sampling/sampling_logp_difference"
        self.metrics.append(Term(name=f"{name}/mean", total=gap_N.sum(), count=known_N.sum()))
        if len(gap_N):
            self._log_extreme(f"{name}/max", gap_N.amax())
            self._log_extreme("sampling/importance_sampling_ratio/min", corrected.amin())
            self._log_extreme("sampling/importance_sampling_ratio/max", corrected.amax())
        return corrected, of_tokens

    def _log_clipping(self) -> None:
        """How often the objective is clipped, over tokens, or over completions where the ratio is theirs.

        Extremes are those of the shares of completions, as far as they have a token that is learnt from.
        """
        config = self.config
        ratio_N = self.ratio_N if config.delta is None else self.ratio_N.clamp(max=config.delta)
        low_N = (ratio_N < 1 - config.epsilon) & (self.advantages_N < 0)
        high_N = (ratio_N > 1 + config.clip_high) & (self.advantages_N > 0)
        clipped = {name: to.to(self.logps_N.dtype) for name, to in (("low", low_N), ("high", high_N))}
        clipped["region"] = clipped["low"] + clipped["high"]
        shares = {
            name: sums(of_N, self.document_N, self.completions) / self.lengths_D for name, of_N in clipped.items()
        }
        for name, values_N in clipped.items():
            self._log(f"clip_ratio/{name}_mean", values_N if self.level == "token" else shares[name])
        if len(self.logps_N):
            self._log_extreme("clip_ratio/low_min", shares["low"][self.document_N].amin())
            self._log_extreme("clip_ratio/high_max", shares["high"][self.document_N].amax())

    def _log_extreme(self, name: str, value: Tensor) -> None:
        self.metrics.append(Term(name=name, total=value.detach().float(), count=1.0))

    def _log(self, name: str, values: Tensor) -> None:
        self.metrics.append(Term(name=name, total=values.detach().float().sum(), count=float(len(values))))
