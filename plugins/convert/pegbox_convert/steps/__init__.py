"""Functions for keys that mean something only together. The tables name them and the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps import (
    axolotl_data,
    axolotl_rest,
    cadence,
    following,
    methods,
    modelling,
    online,
    optimization,
    others,
    preferences,
    running,
    trl_data,
)

Step = Callable[[Conversion], None]
SHARED: dict[str, Step] = {
    function.__name__: function
    for function in (
        *(
            modelling.adapter,
            modelling.attention,
            modelling.checkpointing,
            modelling.template,
            modelling.special_tokens,
        ),
        *(modelling.model_options, modelling.compiling, modelling.placement, optimization.optimizer),
        *(running.length, running.batch, running.precision, running.resume, running.order),
        *(cadence.cadence, cadence.best, cadence.early_stopping),
        *(following.report_to, following.switched_trackers, following.hub),
        *(following.samples, following.relora, following.loss, following.router),
        *(axolotl_rest.groups, axolotl_rest.integrations, axolotl_rest.unfrozen),
        *(methods.method, preferences.preferences, online.online),
        *(others.mixed, others.oumi_datasets, others.factory_datasets, others.factory_stage),
    )
}


def steps_of(program: str) -> dict[str, Step]:
    """The functions that the table of a program can name."""
    own = {"axolotl": axolotl_data.datasets, "trl": trl_data.datasets}
    return SHARED | ({"datasets": own[program]} if program in own else {})
