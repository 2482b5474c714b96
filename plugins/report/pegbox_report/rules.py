"""The built-in health rules for supervised fine-tuning: usual ranges of its figures, and advice beyond them.

Limits are rules of thumb for a language model that was trained before: a loss of 0.5 to 4 at the first step and a
gradient norm of 0.1 to 10 are usual. A model of V tokens that knows nothing has the loss ln V, about 10 to 12.
Losses of preferences and of online methods have other sizes: what is said about a likelihood is not asked of them.
"""

from __future__ import annotations

from pegbox_report.health import Rule
from pegbox_report.panels import NO_LIKELIHOOD

BUILT_IN = (
    Rule(
        "loss-not-finite",
        metric="loss",
        measure="missing",
        above=0.0,
        level="problem",
        says="the loss was not a number in {value} of the logged steps",
        advice="Lower the learning rate, or set trainer.precision to bf16 or fp32; look at the rows of that step.",
    ),
    Rule(
        "first-loss-high",
        metric="loss",
        measure="first",
        above=4.0,
        level="warning",
        without=NO_LIKELIHOOD,
        says="the first loss is {value}; 0.5 to 4 is usual",
        advice="Look at the masks and the template: pegbox data inspect CONFIG. A value near 11 means random weights.",
    ),
    Rule(
        "first-loss-low",
        metric="loss",
        measure="first",
        below=0.05,
        level="warning",
        without=NO_LIKELIHOOD,
        says="the first loss is {value}: there is almost nothing to learn",
        advice="Check that the answers are not part of the prompt, and that the model did not see these rows before.",
    ),
    Rule(
        "loss-flat",
        metric="loss",
        measure="fall",
        below=0.02,
        least=20,
        level="warning",
        without=("reward",),
        says="the loss fell by only {value} of its first value",
        advice="Raise the learning rate, or check that the trained tokens are the answers: pegbox data inspect CONFIG.",
    ),
    Rule(
        "loss-near-zero",
        metric="loss",
        measure="last",
        below=0.05,
        least=5,
        level="warning",
        without=NO_LIKELIHOOD,
        says="the loss ended at {value}: the rows are known by heart",
        advice="Train for fewer epochs, use more data, and look at the loss on held-out rows.",
    ),
    Rule(
        "gradient-zero",
        metric="grad_norm",
        measure="zeros",
        above=0.0,
        level="problem",
        says="the gradient norm was zero in {value} of the logged steps",
        advice="Nothing was learnt there: check what is frozen, and that every row has trained tokens.",
    ),
    Rule(
        "gradient-large",
        metric="grad_norm",
        measure="largest",
        above=100.0,
        level="warning",
        says="the gradient norm reached {value}; above 100 training is unstable",
        advice="Lower the learning rate, warm up for longer, or clip more: trainer.max_grad_norm.",
    ),
    Rule(
        "gradient-spike",
        metric="grad_norm",
        measure="spike",
        above=20.0,
        least=10,
        level="note",
        says="the largest gradient norm is {value} times the median",
        advice="Look at the rows of that step: very long, empty or odd ones. Clipping (max_grad_norm) limits the harm.",
    ),
    Rule(
        "gradient-high-at-the-end",
        metric="grad_norm",
        measure="last",
        above=10.0,
        least=10,
        level="note",
        says="the gradient norm ended at {value}; 0.1 to 10 is usual",
        advice="Lower the learning rate, or let it decay.",
    ),
    Rule(
        "learning-rate-zero",
        metric="learning_rate",
        measure="largest",
        below=1e-12,
        level="problem",
        says="the learning rate never left zero",
        advice="Check the schedule: warm-up may be longer than the run.",
    ),
    Rule(
        "eval-diverges",
        metric="eval_loss",
        measure="rise",
        above=0.05,
        least=3,
        level="warning",
        says="the loss on held-out rows rose by {value} from its lowest point",
        advice="The run is learning its rows by heart: stop earlier, or export the checkpoint with the lowest loss.",
    ),
    Rule(
        "slower",
        metric="tokens_per_s",
        measure="slowdown",
        above=0.3,
        least=20,
        level="note",
        says="the run ended {value} slower than its median speed",
        advice="Look for other programs on the machine, a full disk, or rows that grew longer.",
    ),
)
