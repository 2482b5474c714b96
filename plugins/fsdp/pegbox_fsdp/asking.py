"""What sharding asks of a run before weights are read, and what it refuses there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import ConfigError
from pegbox.types import ModelOptions

from pegbox_fsdp.config import FsdpConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Runtime

PLUGIN = "fsdp"


def ask(ctx: Context) -> ModelOptions | None:
    """Processes but the first get a model without weights. Without a runtime (a plan, an inspection) nothing is asked.

    Raises:
        ConfigError: settings do not fit the processes or the arithmetic of the run.
    """
    owner = ctx.kernel.owners("place_model").get("")
    if owner != PLUGIN:
        raise ConfigError(
            f"fsdp is in plugins, but '{owner}' places the model",
            "Nothing would be sharded.",
            "Set use: {place_model: fsdp}, or remove fsdp from plugins.",
        )
    runtime: Runtime | None = vars(ctx).get("runtime")
    if runtime is None:
        return None
    settings = ctx.section(FsdpConfig)
    check(settings, runtime)
    return ModelOptions(empty=True) if settings.load == "rank0" and runtime.rank > 0 else None


def check(settings: FsdpConfig, runtime: Runtime) -> None:
    """Raise unless the settings fit the processes of this run."""
    ranks = runtime.world_size
    if runtime.precision == "fp16":
        raise ConfigError(
            "trainer.precision is fp16, and the model is sharded",
            "The scale of an fp16 loss is lowered where a gradient overflows, and each process sees its shards only.",
            "Set trainer.precision to bf16 or fp32.",
        )
    if ranks % settings.replicas:
        raise ConfigError(
            f"fsdp.replicas is {settings.replicas}, but the run has {ranks} processes",
            "Every copy is sharded over as many processes.",
            f"Set it to a divisor of {ranks}.",
        )
    keep, shards = settings.reshard_after_forward, ranks // settings.replicas
    if not isinstance(keep, bool) and (shards % keep or keep >= shards):
        raise ConfigError(
            f"fsdp.reshard_after_forward is {keep}, but a copy is sharded over {shards} processes",
            "Weights are kept in shards over fewer processes, each group of the same size.",
            f"Set it to true, false, or a divisor of {shards} between 1 and it.",
        )
    if settings.offload and runtime.device.type == "cpu":
        raise ConfigError(
            "fsdp.offload is on, and the run trains on the CPU",
            "Shards are in host memory already.",
            "Remove fsdp.offload.",
        )
