"""The section `router-loss` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting


class RouterLossConfig(Section):
    """How strongly experts are kept equally busy (Fedus et al. 2021, arXiv:2101.03961)."""

    coefficient: float | None = setting(
        None, "Weight beside the other loss; the model's own `router_aux_loss_coef` if not set.", unit="1", gt=0
    )
    over: Literal["micro_batch", "document"] = setting(
        "micro_batch",
        "What must be balanced: the tokens of a micro-batch together, as transformers computes it, or those of each "
        "document, which no split into micro-batches changes.",
    )
