"""Names of what rollouts bring to a batch (`Batch.extra`)."""

from __future__ import annotations

ADVANTAGES = "advantages"
OLD_LOGPS = "old_logps"
SAMPLER_LOGPS = "sampler_logps"
KEPT = "kept_tokens"
REFERENCE_LOGPS = "reference_logps"

DOCS = {
    ADVANTAGES: "How much better than expected a completion was; one number for each document.",
    OLD_LOGPS: "Log-probability of each trained token under the policy that the rollouts were made with.",
    SAMPLER_LOGPS: "Log-probability of each trained token as the engine that sampled it reported it.",
    KEPT: "Whether each trained token is among those of the highest entropy.",
}

EXTREMES = {
    "completions/min_length": ("min", "Tokens of the shortest completion."),
    "completions/max_length": ("max", "Tokens of the longest completion."),
    "completions/min_terminated_length": ("min", "Tokens of the shortest completion that ended by itself."),
    "completions/max_terminated_length": ("max", "Tokens of the longest completion that ended by itself."),
    "clip_ratio/low_min": ("min", "Smallest share of a completion's tokens whose ratio is clipped from below."),
    "clip_ratio/high_max": ("max", "Largest share of a completion's tokens whose ratio is clipped from above."),
    "sampling/importance_sampling_ratio/min": ("min", "Smallest ratio between trainer and sampler."),
    "sampling/importance_sampling_ratio/max": ("max", "Largest ratio between trainer and sampler."),
    "sampling/sampling_logp_difference/max": ("max", "Largest gap between log-probabilities of trainer and sampler."),
}
"""Figures that are the smallest or largest of a logged window; all others are means."""
