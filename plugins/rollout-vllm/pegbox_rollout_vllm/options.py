"""From the section to vLLM's arguments: what cannot work is an error before anything is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox.types import Model

    from pegbox_rollout_vllm.config import RolloutVllmConfig

SERVED = "base"
"""Name of the base model at a server that the run starts."""
OWN_ONLY = ("python", "command", "port", "max_model_len", "memory_share", "tensor_parallel", "args", "env")
OWN_ONLY += ("eager", "host", "restarts")
SERVER_ONLY = ("url", "served_name", "python", "command", "host", "port", "tensor_parallel", "env", "restarts")
SERVER_ONLY += ("start_timeout_s", "request_timeout_s", "parallel", "transfer")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of adapters that vLLM can be started for."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
"""Variables by which torchrun tells processes that they are ranks of one job: the server is none."""


class Shape(NamedTuple):
    """What the server must know of the model: its base, the largest rank of its adapter (None: no adapter)."""

    base: str
    rank: int | None


def require_usable(config: RolloutVllmConfig) -> None:
    """Refuse what cannot work.

    Raises:
        ConfigError: settings contradict each other, or the program to start is not there.
    """
    if "sleep_level" in config.model_fields_set and not config.sleep:
        raise ConfigError(
            "rollout-vllm.sleep_level is set, and rollout-vllm.sleep is false",
            "vLLM never sleeps then.",
            "Set rollout-vllm.sleep to true, or remove sleep_level.",
        )
    if config.mode == "colocate":
        _require_here(config)
    else:
        _require_server(config)


def _require_here(config: RolloutVllmConfig) -> None:
    """Refuse what vLLM in the trainer's process cannot do."""
    named = [name for name in SERVER_ONLY if name in config.model_fields_set]
    if named:
        raise ConfigError(
            f"rollout-vllm.mode is colocate, and {', '.join(named)} is set",
            "These are about a server; there is none.",
            "Remove them, or set rollout-vllm.mode to server.",
        )
    if find_spec("vllm") is None:
        raise ConfigError(
            "rollout-vllm.mode is colocate, and vllm cannot be imported here",
            "vLLM then runs in the process of the trainer, so both must be installed in one environment.",
            "Install vllm beside pegbox, or set rollout-vllm.mode to server, with rollout-vllm.python naming the "
            "interpreter of vLLM's environment.",
        )


def _require_server(config: RolloutVllmConfig) -> None:
    """Refuse what neither a started server nor one that exists can do."""
    if config.url is not None:
        named = [name for name in OWN_ONLY if name in config.model_fields_set]
        if named:
            raise ConfigError(
                f"rollout-vllm.url is set, and so is {', '.join(named)}",
                "These say how the run starts a server; with a url it starts none.",
                "Remove them, or the url.",
            )
        return
    if config.served_name is not None:
        raise ConfigError(
            "rollout-vllm.served_name is set without a url",
            "A server that the run starts gets its names from the run.",
            "Remove served_name, or set rollout-vllm.url.",
        )
    if config.python is not None and config.command:
        raise ConfigError(
            "rollout-vllm.python and rollout-vllm.command are both set",
            "Each says how the server is started.",
            "Remove one of them.",
        )
    program = launcher(config)[0]
    if shutil.which(program) is None:
        raise ConfigError(
            f"rollout-vllm would start '{program}', which is not there",
            "vLLM pins a torch of its own, so it is often in another environment.",
            "Set rollout-vllm.python to the interpreter of that environment, or rollout-vllm.url to a running server.",
        )


def launcher(config: RolloutVllmConfig) -> list[str]:
    """The program and its arguments before the model."""
    if config.python is not None:
        return [config.python, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return list(config.command) or ["vllm", "serve"]


def command(config: RolloutVllmConfig, shape: Shape, port: int, precision: str) -> list[str]:
    """The whole command line of a server."""
    words = [*launcher(config), shape.base, "--served-model-name", SERVED]
    words += ["--host", config.host, "--port", str(port), "--tensor-parallel-size", str(config.tensor_parallel)]
    if by_broadcast(config, shape):
        words += ["--worker-extension-cls", "pegbox_broadcast.Receiver"]
    return [*words, *engine_words(config, shape, precision)]


def engine_words(config: RolloutVllmConfig, shape: Shape, precision: str) -> list[str]:
    """The arguments of vLLM's engine, of a server or in this process."""
    # What is sampled must be what was asked for: no defaults of the model's folder, and log-probabilities of the
    # distribution that was sampled from (after the temperature).
    words = ["--dtype", DTYPES[precision] if config.dtype == "auto" else config.dtype]
    words += ["--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"]
    if config.max_model_len is not None:
        words += ["--max-model-len", str(config.max_model_len)]
    if config.memory_share is not None:
        words += ["--gpu-memory-utilization", str(config.memory_share)]
    if config.eager:
        words += ["--enforce-eager"]
    if config.sleep:
        words += ["--enable-sleep-mode"]
    if shape.rank is not None:
        words += ["--enable-lora", "--max-lora-rank", str(served_rank(shape.rank))]
    return [*words, *config.args]


def by_broadcast(config: RolloutVllmConfig, shape: Shape) -> bool:
    """Whether full weights go from memory to memory.

    Raises:
        ConfigError: it was asked for, and the model has an adapter.
    """
    if config.transfer == "broadcast" and shape.rank is not None:
        raise ConfigError(
            "rollout-vllm.transfer is broadcast, and the model has an adapter",
            "vLLM reads adapters from folders; they are small.",
            "Remove rollout-vllm.transfer, or train without an adapter.",
        )
    return config.transfer == "broadcast"


def served_rank(rank: int) -> int:
    """The smallest rank that vLLM can be started for and that holds adapters of `rank`.

    Raises:
        ConfigError: there is none.
    """
    for allowed in RANKS:
        if rank <= allowed:
            return allowed
    raise ConfigError(
        f"the adapter has rank {rank}",
        f"vLLM serves adapters up to rank {RANKS[-1]}.",
        "Lower the adapter's rank, or train without an adapter.",
    )


def environment(config: RolloutVllmConfig) -> dict[str, str]:
    """The server's variables: those of this process without the launcher's, vLLM's switches, those of the config."""
    ours: Mapping[str, str] = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER and not name.startswith("TORCHELASTIC_")
    }
    made = {**inherited, **ours, **config.env}
    if config.transfer == "broadcast":
        worker = str(Path(__file__).with_name("worker"))
        made["PYTHONPATH"] = os.pathsep.join(filter(None, (worker, made.get("PYTHONPATH"))))
    return made


def shape_of(model: Model) -> Shape:
    """What a server must know of a model; the rank is read from PEFT's own record of the adapter.

    Adapters whose base was changed are exported at twice their rank, so that is what is made room for.

    Raises:
        ConfigError: the adapter is of a kind that vLLM does not load.
    """
    if model.adapter is None:
        return Shape(model.base, None)
    configs = getattr(model.module, "peft_config", None)
    if model.adapter != "peft" or not configs:
        raise ConfigError(
            f"the adapter's format is '{model.adapter}'",
            "vLLM loads adapters in PEFT's layout.",
            "Use another rollout engine, such as rollout-hf.",
        )
    ranks = [rank for config in configs.values() for rank in (config.r, *config.rank_pattern.values())]
    doubled = model.without_adapter is None
    return Shape(model.base, max(ranks) * (2 if doubled else 1))
