"""Which vLLM a run has, and how weights get to it: the one place that looks at mode and transfer.

what is trained    where vLLM is      packed as            delivered
an adapter         either             a folder             loaded under a name of its own
all weights        a server, disk     a folder             the workers read it in place
                   a server,          the trainer's        by NCCL or gloo (broadcast.py)
                   broadcast          tensors
                   this process       the trainer's        copied in place (colocated.py)
                                      tensors
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pegbox.errors import ConfigError

from pegbox_rollout_vllm.cargo import Deliver, Exports, Live, Pack
from pegbox_rollout_vllm.connection import Connection
from pegbox_rollout_vllm.live import LiveWeights
from pegbox_rollout_vllm.options import by_broadcast, shape_of
from pegbox_rollout_vllm.server import OwnServer

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model

    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.serving import Vllm


class Route(NamedTuple):
    """A vLLM, who packs weights for it, and who delivers full ones."""

    vllm: Vllm
    pack: Pack
    deliver: Deliver


def route(ctx: Context, model: Model, config: RolloutVllmConfig) -> Route:
    """The route of this run.

    Raises:
        ConfigError: model or processes do not fit the config.
    """
    shape = shape_of(model)
    if config.sleep_level == 2 and shape.rank is not None:
        raise ConfigError(
            "rollout-vllm.sleep_level is 2, and the model has an adapter",
            "vLLM would throw the base model away, which is never sent.",
            "Set rollout-vllm.sleep_level to 1.",
        )
    folder = Path(config.weights) if config.weights else ctx.folder / "vllm" / "weights"
    if config.mode == "colocate":
        from pegbox_rollout_vllm.colocated import Colocated

        if ctx.runtime.world_size > 1:
            raise ConfigError(
                f"rollout-vllm.mode is colocate, and the run has {ctx.runtime.world_size} processes",
                "vLLM shares the process of one trainer; several were not built.",
                "Train in one process, or set rollout-vllm.mode to server.",
            )
        here = Colocated(config, shape, ctx.runtime.precision)
        return Route(here, Exports(ctx, model, folder) if shape.rank is not None else alive(model, config), here.take)
    server = None
    if config.url is None:
        server = OwnServer(config, shape, ctx.runtime.precision, ctx.folder / "vllm" / "server.log")
    connection = Connection(config, server, ctx.log)
    if not by_broadcast(config, shape):
        return Route(connection, Exports(ctx, model, folder), connection.read_folder)
    from pegbox_rollout_vllm.broadcast import Broadcast

    broadcast = Broadcast(connection, ctx.runtime.device, config.request_timeout_s)
    ctx.exit.callback(broadcast.close)
    return Route(connection, alive(model, config), broadcast)


def alive(model: Model, config: RolloutVllmConfig) -> Pack:
    """Packs the trainer's own tensors.

    Raises:
        ConfigError: this process holds a part of them only, or a folder was named for them.
    """
    if config.weights is not None:
        raise ConfigError(
            "rollout-vllm.weights names a folder, and weights go to vLLM from memory",
            "Nothing would be written there.",
            "Remove rollout-vllm.weights.",
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.module.parameters()):
        raise ConfigError(
            "weights shall go to vLLM from memory, and they are sharded over processes",
            "The first process holds a part of each only.",
            "Set rollout-vllm.transfer to disk.",
        )
    weights = LiveWeights(model.module)
    return lambda _label, expected, _ready: Live(weights, expected)
