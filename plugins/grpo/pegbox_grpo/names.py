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
