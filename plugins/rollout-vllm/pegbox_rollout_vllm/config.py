"""The section `rollout-vllm` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting


class RolloutVllmConfig(Section):
    """Which vLLM samples, how it is started, and how strictly it is checked."""

    mode: Literal["server", "colocate"] = setting(
        "server",
        "`server`: another process, reached by HTTP; `colocate`: the trainer's process, if it is the only one.",
    )
    transfer: Literal["disk", "broadcast"] = setting(
        "disk",
        "How full weights get to a server: `disk`, a folder that it reads; `broadcast`, from memory to memory, by NCCL "
        "where trainer and workers each have a GPU for themselves, else by gloo.",
    )
    url: str | None = setting(
        None, "Address of a server that exists; none: the run starts one.", pattern=r"^https?://[^/?#]+/?$"
    )
    served_name: str | None = setting(
        None, "Name of the base model at `url`; none: the first that it lists.", min_length=1
    )
    python: str | None = setting(
        None, "Interpreter of the environment that holds vLLM; none: see `command`.", min_length=1
    )
    command: list[str] = setting(
        [], "Program and first arguments to start a server, before the model; empty: `vllm serve`, found on PATH."
    )
    host: str = setting("127.0.0.1", "Address that the started server listens on.", min_length=1)
    port: int = setting(0, "Port of the started server; 0: a free one.", ge=0, le=65535)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Arithmetic of vLLM, also of a server that exists; `auto`: that of the run's own forwards."
    )
    max_model_len: int | None = setting(
        None, "Longest prompt and completion together; none: the model's.", unit="tokens", ge=2
    )
    memory_share: float | None = setting(
        None,
        "Share of a GPU's memory that vLLM takes; none: its default, too much beside a trainer on the same GPU.",
        unit="1",
        gt=0,
        le=1,
    )
    tensor_parallel: int = setting(1, "GPUs that the started server splits the model over.", ge=1)
    eager: bool = setting(False, "Start without compilation and CUDA graphs: sooner ready, slower after.")
    args: list[str] = setting([], "Further arguments, as vLLM documents them for `vllm serve`.")
    env: dict[str, str] = setting(
        {},
        "Environment variables of the started server beside those of this process, e.g. {CUDA_VISIBLE_DEVICES: '1'}.",
    )
    sleep: bool = setting(False, "Let vLLM give its memory back while the run learns (its sleep mode).")
    sleep_level: Literal[1, 2] = setting(
        1, "1: its weights wait in the host's memory; 2: they are thrown away and sent again (full weights only)."
    )
    restarts: int = setting(1, "How often a started server that died is started again during the run.", ge=0)
    start_timeout_s: float = setting(600.0, "Time for a server to answer at first.", unit="s", gt=0)
    request_timeout_s: float = setting(600.0, "Time for one answer.", unit="s", gt=0)
    parallel: int = setting(64, "Prompts that are asked at the same time.", ge=1)
    weights: str | None = setting(
        None, "Folder for weights on their way, which the server must see too; none: one in the run's.", min_length=1
    )
    canary: bool = setting(
        True, "At the first sync send visibly changed weights too, and look whether the server computes with them."
    )
    tolerance: float | None = setting(
        None,
        "Mean difference of log-probabilities between server and trainer that is allowed on the probes; none: 0.001 if "
        "both compute in float32, else 0.2.",
        unit="nats",
        gt=0,
    )
