"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

RULES: Mapping[str, Rule] = {
    "prm-chance": {
        "metric": "accuracy",
        "measure": "last",
        "below": 0.5,
        "least": 10,
        "says": "the verdict on a step is right in only {value:.0%} of the steps; more than one half is usual",
        "advice": "Look at the data with `pegbox data inspect`: do the marks stand behind the steps, with the verdict "
        "of each? Else train longer, or raise the learning rate.",
        "source": "one half is chance between two verdicts",
    },
    "prm-held-out-chance": {
        "metric": "eval_accuracy",
        "measure": "last",
        "window": 1,
        "below": 0.5,
        "least": 1,
        "says": "of held-out steps, the verdict is right in only {value:.0%}",
        "advice": "What is learnt does not carry over: take fewer epochs, a lower learning rate or more data.",
        "source": "one half is chance between two verdicts",
    },
    "prm-undecided": {
        "metric": "loss",
        "measure": "last",
        "above": 0.7,
        "least": 10,
        "says": "the loss is {value}, and a verdict by a coin has 0.693",
        "advice": "Nothing was learnt yet: train longer, raise the learning rate, or look at the verdicts.",
        "source": "ln 2: the cross-entropy of one half (arXiv:2305.20050, section 2.6)",
    },
}


def rules() -> Sequence[Item]:
    """The rules as items of kind `health_rule`."""
    return [
        Item(kind="health_rule", name=name, target={**rule, "plugins": ("prm",)}, doc=str(rule["says"]))
        for name, rule in RULES.items()
    ]
