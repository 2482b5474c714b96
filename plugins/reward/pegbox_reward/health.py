"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

RULES: Mapping[str, Rule] = {
    "reward-chance": {
        "metric": "accuracy",
        "measure": "last",
        "below": 0.5,
        "least": 10,
        "says": "the chosen answer has the higher reward in only {value:.0%} of the pairs; more than one half is usual",
        "advice": "Look at the data with `pegbox data inspect`: are chosen and rejected swapped, or alike? Else train "
        "longer, or raise the learning rate.",
        "source": "one half is chance; people agree on about 0.7 of such pairs (arXiv:2203.02155, section 3.4)",
    },
    "reward-held-out-chance": {
        "metric": "eval_accuracy",
        "measure": "last",
        "window": 1,
        "below": 0.55,
        "least": 1,
        "says": "of held-out pairs, the chosen answer has the higher reward in only {value:.0%}",
        "advice": "What is learnt does not carry over: one epoch, a lower learning rate or more data.",
        "source": "one half is chance; reward models reach 0.6 to 0.75 on people's preferences (arXiv:2203.02155, "
        "arXiv:2307.09288)",
    },
    "reward-by-heart": {
        "metric": "accuracy",
        "measure": "last",
        "above": 0.98,
        "least": 10,
        "level": "note",
        "says": "the chosen answer has the higher reward in {value:.0%} of the pairs",
        "advice": "Pairs of people are never that clear: look at eval_accuracy, and whether something cheap, such as "
        "length, tells them apart.",
        "source": "people agree on about 0.7 of such pairs, and more than one epoch overfits (arXiv:2203.02155)",
    },
    "reward-drifted": {
        "metric": "mean_reward",
        "measure": "last",
        "above": 10.0,
        "below": -10.0,
        "least": 10,
        "level": "note",
        "says": "rewards lie around {value}",
        "advice": "The loss sees differences alone, so rewards may drift together: set reward.center to 0.01.",
        "source": "arXiv:2312.09244 holds them around zero; the limit is a rule of thumb",
    },
}


def rules() -> Sequence[Item]:
    """The rules as items of kind `health_rule`."""
    return [
        Item(kind="health_rule", name=name, target={**rule, "plugins": ("reward",)}, doc=str(rule["says"]))
        for name, rule in RULES.items()
    ]
