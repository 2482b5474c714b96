"""Figures of preferences and of online methods that are read together: which share a chart, and under which heading.

Names are those that the plugins log (TRL's). A figure that no panel names is drawn by itself, under its own name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

NO_LIKELIHOOD = ("reward", "rewards/margins", "mean_reward")
"""Runs that log one of these have a loss that is no likelihood of tokens: its size says nothing by itself."""
ONE_REWARD = re.compile(r"rewards/(.+)/mean")


@dataclass(frozen=True)
class Panel:
    """One chart: the figures in it by label.

    Attributes:
        group: heading that it stands under.
        needs: the run logs one of these; none: whatever it logs.
        zero: the axis begins at 0.
    """

    group: str
    title: str
    figures: tuple[tuple[str, str], ...]
    note: str = ""
    unit: str = ""
    needs: tuple[str, ...] = ()
    zero: bool = False


PREFERENCES, REWARDS, COMPLETIONS, POLICY = "Preferences", "Rewards", "Completions", "Policy"
ONLINE = ("reward",)
LENGTHS = (("mean", "mean"), ("longest", "max"), ("shortest", "min"))
BEFORE = (
    Panel(
        PREFERENCES,
        "Rewards of answers",
        (("chosen", "rewards/chosen"), ("rejected", "rewards/rejected")),
        "mean over pairs",
    ),
    Panel(PREFERENCES, "Margin", (("train", "rewards/margins"),), "chosen minus rejected"),
    Panel(PREFERENCES, "Accuracy", (("train", "rewards/accuracies"),), "share of pairs with the chosen answer ahead"),
    Panel(
        PREFERENCES,
        "Log-probabilities of answers",
        (("chosen", "logps/chosen"), ("rejected", "logps/rejected")),
        "nats",
    ),
    Panel(REWARDS, "Reward", (("train", "reward"),), "weighted sum, mean over completions"),
    Panel(REWARDS, "Spread of rewards", (("train", "reward_std"),), "standard deviation", zero=True),
    Panel(REWARDS, "Groups with one reward", (("train", "frac_reward_zero_std"),), "share; they teach nothing"),
)
AFTER = (
    Panel(
        COMPLETIONS,
        "Length",
        tuple((label, f"completions/{name}_length") for label, name in LENGTHS),
        "tokens",
        needs=ONLINE,
    ),
    Panel(COMPLETIONS, "Cut completions", (("train", "completions/clipped_ratio"),), "share at the longest length"),
    Panel(
        COMPLETIONS,
        "Length of those that ended",
        tuple((label, f"completions/{name}_terminated_length") for label, name in LENGTHS),
        "tokens",
    ),
    Panel(
        COMPLETIONS,
        "Seconds of a generation",
        (("generate", "generate_s"), ("score", "score_s"), ("learn", "learn_s")),
        unit="seconds",
        zero=True,
    ),
    Panel(POLICY, "KL divergence", (("train", "kl"),), "from the reference, nats", needs=(*ONLINE, "rewards/margins")),
    Panel(POLICY, "Entropy", (("train", "entropy"),), "of tokens, nats", needs=ONLINE),
    Panel(
        POLICY,
        "Clipped ratios",
        (
            *(
                (label, f"clip_ratio/{name}_mean")
                for label, name in (("all", "region"), ("low", "low"), ("high", "high"))
            ),
            ("low, least", "clip_ratio/low_min"),
            ("high, most", "clip_ratio/high_max"),
        ),
        "share of tokens",
        zero=True,
    ),
    Panel(
        POLICY,
        "Trainer over sampler",
        tuple((name, f"sampling/importance_sampling_ratio/{name}") for name in ("mean", "max", "min")),
        "ratio of probabilities; 1 is on-policy",
    ),
    Panel(
        POLICY,
        "Trainer against sampler",
        tuple((name, f"sampling/sampling_logp_difference/{name}") for name in ("mean", "max")),
        "difference of log-probabilities, nats",
        zero=True,
    ),
)


def panels_of(keys: Iterable[str]) -> Iterator[Panel]:
    """The panels of a run that logs these figures, in the order of the page; each has one of them at least."""
    known = set(keys)
    rewards = (
        Panel(REWARDS, name, (("mean", f"rewards/{name}/mean"), ("deviation", f"rewards/{name}/std")), "one reward")
        for key in keys
        if (match := ONE_REWARD.fullmatch(key)) and (name := match[1])
    )
    for panel in (*BEFORE, *rewards, *AFTER):
        logged = known & {key for _, key in panel.figures}
        if logged and (not panel.needs or known & set(panel.needs)):
            yield panel
