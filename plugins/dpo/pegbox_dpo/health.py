"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do.

The limits are the field's rules of thumb: after some steps the policy tells most pairs apart, and the loss has fallen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

RULES: Mapping[str, Rule] = {
    "pairs-alike": {
        "metric": "rewards/accuracies",
        "measure": "last",
        "below": 0.5,
        "least": 10,
        "says": "the chosen answer has the higher reward in only {value:.0%} of the pairs; more than one half is usual",
        "advice": "Look at the data with `pegbox data inspect`: are chosen and rejected swapped, or alike? Else train "
        "longer, or raise the learning rate.",
    },
    "margins-negative": {
        "metric": "rewards/margins",
        "measure": "last",
        "below": 0.0,
        "least": 10,
        "says": "rejected answers have the higher reward, by {value} on average",
        "advice": "Look at the data with `pegbox data inspect`: are chosen and rejected swapped?",
    },
    "held-out-pairs-alike": {
        "metric": "eval_rewards/accuracies",
        "measure": "last",
        "window": 1,
        "below": 0.5,
        "least": 2,
        "says": "of held-out pairs, the chosen answer has the higher reward in only {value:.0%}",
        "advice": "What is learnt does not carry over: take fewer epochs, a lower learning rate or more data.",
    },
    "chosen-unlikely": {
        "metric": "rewards/chosen",
        "measure": "last",
        "below": -3.0,
        "least": 10,
        "level": "note",
        "says": "chosen answers became much less likely than they were: their reward is {value}",
        "advice": "Usual when both answers are alike. Add `sft` to dpo.loss, or raise dpo.beta.",
    },
    "preference-gradients": {
        "metric": "grad_norm",
        "measure": "last",
        "above": 10.0,
        "least": 10,
        "level": "note",
        "says": "the gradient's norm is {value}; 0.01 to 10 is usual",
        "advice": "Lower the learning rate; for the losses ipo and sppo_hard large gradients are usual at first.",
    },
}


def items() -> Iterator[Item]:
    """The rules as items of kind `health_rule`."""
    for name, rule in RULES.items():
        yield Item(kind="health_rule", name=name, target={**rule, "plugins": ("dpo",)}, doc=str(rule["says"]))
