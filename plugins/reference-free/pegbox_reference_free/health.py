"""Usual ranges of the figures of a run, as data for the report page: what is told beyond them, and what to do.

The names begin with the plugin's, so that two losses that are weighed may be active together. Where the source names no
limit it is a rule of thumb: after some steps the policy tells most pairs apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pegbox.types import Item

Rule = Mapping[str, str | float | tuple[str, ...]]

OF_PAIRS: Mapping[str, Rule] = {
    "pairs-alike": {
        "metric": "rewards/accuracies",
        "measure": "last",
        "below": 0.5,
        "least": 10,
        "says": "the chosen answer is the likelier one in only {value:.0%} of the pairs; more than one half is usual",
        "advice": "Look at the data with `pegbox data inspect`: are chosen and rejected swapped, or alike? Else train "
        "longer, or raise the learning rate.",
        "source": "one half is chance; 0.7 and above is what trainers of preferences call usual",
    },
    "held-out-pairs-alike": {
        "metric": "eval_rewards/accuracies",
        "measure": "last",
        "window": 1,
        "below": 0.5,
        "least": 2,
        "says": "of held-out pairs, the chosen answer is the likelier one in only {value:.0%}",
        "advice": "What is learnt does not carry over: take fewer epochs, a lower learning rate or more data.",
        "source": "one half is chance",
    },
}
UNLEARNT: Mapping[str, Rule] = {
    "chosen-unlikely": {
        "metric": "logps/chosen",
        "measure": "fall",
        "above": 1.0,
        "least": 10,
        "says": "the log-probability of chosen answers fell by {value} of what it was at first",
        "advice": "The margin is won by unlearning both answers: lower the learning rate, or raise the weight of the "
        "likelihood, sft_weight.",
        "source": "CPO adds the likelihood for this (arXiv:2401.08417, eq. 6); the authors of SimPO warn of learning "
        "rates at which models repeat themselves (arXiv:2405.14734)",
    },
}
LIKELIHOOD: Mapping[str, Rule] = {
    "likelihood-lost": {
        "metric": "nll_loss",
        "measure": "rise",
        "above": 0.1,
        "least": 10,
        "says": "the loss on the tokens of chosen answers rose by {value} from its lowest point",
        "advice": "The likelihood should hold while answers are told apart: lower the learning rate, or the weight of "
        "the preference.",
        "source": "the loss holds it beside the preference (arXiv:2403.07691, eq. 6; arXiv:2401.08417, eq. 6)",
    },
}
ODDS: Mapping[str, Rule] = {
    "odds-negative": {
        "metric": "log_odds_chosen",
        "measure": "last",
        "below": 0.0,
        "least": 10,
        "says": "rejected answers have the higher odds: the log odds ratio is {value}",
        "advice": "Look at the data with `pegbox data inspect`: are chosen and rejected swapped? Else raise "
        "orpo.alpha.",
        "source": "what the loss raises (arXiv:2403.07691, eq. 7); 0 is chance",
    },
}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "orpo": {**OF_PAIRS, **LIKELIHOOD, **ODDS},
    "cpo": {**OF_PAIRS, **LIKELIHOOD, **UNLEARNT},
    "simpo": {**OF_PAIRS, **UNLEARNT},
}


def rules_of(plugin: str) -> Sequence[Item]:
    """The rules of one of the plugins as items of kind `health_rule`."""
    return [
        Item(kind="health_rule", name=f"{plugin}-{name}", target={**rule, "plugins": (plugin,)}, doc=str(rule["says"]))
        for name, rule in RULES[plugin].items()
    ]
