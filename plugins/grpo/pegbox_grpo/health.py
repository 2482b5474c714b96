"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do.

The limits are the field's rules of thumb for runs of some hundred steps; each is a fact about the run and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

RULES: Mapping[str, Rule] = {
    "reward-flat": {
        "metric": "reward",
        "measure": "rise",
        "below": 0.02,
        "least": 20,
        "says": "the reward rose by only {value} of its lowest value",
        "advice": "Look at completions.jsonl: is the task within reach (rewards differ within a group)? "
        "Then raise the learning rate, or grpo.samples.",
    },
    "reward-all-alike": {
        "metric": "reward_std",
        "measure": "zeros",
        "above": 0.1,
        "least": 5,
        "level": "problem",
        "says": "all rewards were the same in {value} of the logged steps",
        "advice": "Nothing is learnt there: the reward fails, or the task is much too easy or too hard.",
    },
    "groups-alike": {
        "metric": "frac_reward_zero_std",
        "measure": "last",
        "above": 0.8,
        "least": 5,
        "says": "in {value:.0%} of the groups all completions had the same reward",
        "advice": "Raise grpo.samples or the temperature, or take prompts of middling difficulty.",
    },
    "entropy-collapse": {
        "metric": "entropy",
        "measure": "last",
        "below": 0.01,
        "least": 5,
        "level": "problem",
        "says": "the entropy of tokens fell to {value} nats; 0.05 to 0.5 is usual",
        "advice": "Lower the learning rate, raise grpo.epsilon_high, or set grpo.entropy_coef.",
    },
    "kl-diverged": {
        "metric": "kl",
        "measure": "last",
        "above": 2.0,
        "says": "the divergence from the reference reached {value} nats for each token; below 0.5 is usual",
        "advice": "Lower the learning rate, or raise grpo.beta.",
    },
    "sampler-far": {
        "metric": "sampling/sampling_logp_difference/mean",
        "measure": "last",
        "above": 0.1,
        "says": "log-probabilities of sampler and trainer differ by {value} nats for each token",
        "advice": "Have the engine compute in the trainer's precision; check which weights it serves.",
    },
    "sampler-ratio-small": {
        "metric": "sampling/importance_sampling_ratio/min",
        "measure": "smallest",
        "below": 0.1,
        "level": "note",
        "says": "the ratio between trainer and sampler fell to {value}",
        "advice": "Single tokens are far off-policy: look at sampling_logp_difference.",
    },
    "ratio-clipped": {
        "metric": "clip_ratio/region_mean",
        "measure": "last",
        "above": 0.3,
        "says": "the ratio of probabilities was clipped for {value:.0%} of the tokens; below 10% is usual",
        "advice": "Lower the learning rate, grpo.iterations or grpo.steps_per_generation.",
    },
    "completions-cut": {
        "metric": "completions/clipped_ratio",
        "measure": "last",
        "above": 0.8,
        "says": "{value:.0%} of the completions were cut at grpo.max_completion_length",
        "advice": "Raise grpo.max_completion_length, set grpo.mask_truncated, or reward short answers.",
    },
}


def items() -> Iterator[Item]:
    """The rules as items of kind `health_rule`."""
    for name, rule in RULES.items():
        yield Item(kind="health_rule", name=name, target={**rule, "plugins": ("grpo",)}, doc=str(rule["says"]))
