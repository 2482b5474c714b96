"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do.

Where the source names no limit it is a rule of thumb: after some steps the policy tells wanted from unwanted answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

RULES: Mapping[str, Rule] = {
    "kto-one-kind": {
        "metric": "share/chosen",
        "measure": "last",
        "above": 0.999,
        "below": 0.001,
        "least": 5,
        "says": "{value:.0%} of the answers are wanted: the other kind is missing",
        "advice": "Give rows of both labels. If there are no others, train on the wanted ones with sft.",
        "source": "without one kind nothing is told apart (arXiv:2402.01306, eq. 8)",
    },
    "kto-margins-negative": {
        "metric": "rewards/margins",
        "measure": "last",
        "below": 0.0,
        "least": 10,
        "says": "unwanted answers have the higher reward, by {value} on average",
        "advice": "Look at the data with `pegbox data inspect`: are the labels swapped?",
        "source": "what the loss raises (arXiv:2402.01306, eq. 8); 0 is where it begins",
    },
    "kto-held-out-margins-negative": {
        "metric": "eval_rewards/margins",
        "measure": "last",
        "window": 1,
        "below": 0.0,
        "least": 2,
        "says": "of held-out rows, unwanted answers have the higher reward, by {value} on average",
        "advice": "What is learnt does not carry over: take fewer epochs, a lower learning rate or more data.",
        "source": "0 is where it begins",
    },
    "kto-chosen-unlikely": {
        "metric": "rewards/chosen",
        "measure": "last",
        "below": -3.0,
        "least": 10,
        "level": "note",
        "says": "wanted answers became much less likely than they were: their reward is {value}",
        "advice": "Raise kto.desirable_weight, or lower the learning rate.",
        "source": "at a reward of -3 the loss is flat: 0.95 of 1 (arXiv:2402.01306, eq. 7)",
    },
    "kto-diverged": {
        "metric": "kl",
        "measure": "last",
        "above": 50.0,
        "least": 10,
        "says": "the policy is {value} nats an answer from the reference",
        "advice": "Lower the learning rate, or raise kto.beta.",
        "source": "at beta 0.1 an answer as likely as the reference finds it is then 5 below the reference point, "
        "where the loss is flat (arXiv:2402.01306, eq. 7)",
    },
    "kto-no-divergence": {
        "metric": "kl",
        "measure": "zeros",
        "above": 0.9,
        "least": 20,
        "level": "note",
        "says": "the estimate of the divergence was 0 in {value} of the logged steps",
        "advice": "A divergence is above 0 once the policy has moved: take steps of more rows (trainer.batch), or set "
        "kto.loss=apo_zero_unpaired, which does without it.",
        "source": "the estimate is biased, and its mean is cut at 0 (arXiv:2402.01306, section 4.1)",
    },
}


def rules() -> Sequence[Item]:
    """The rules as items of kind `health_rule`."""
    return [
        Item(kind="health_rule", name=name, target={**rule, "plugins": ("kto",)}, doc=str(rule["says"]))
        for name, rule in RULES.items()
    ]
