"""What cannot work is refused before anything is loaded; the rest becomes a command line and an environment."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pegbox.errors import ConfigError
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import plain_model
from pegbox_rollout_vllm.config import RolloutVllmConfig
from pegbox_rollout_vllm.options import Shape, command, environment, require_usable, served_rank, shape_of
from pegbox_rollout_vllm.routes import route


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "colocate"}, "mode is colocate, and vllm cannot be imported here"),
        ({"mode": "colocate", "python": "p", "restarts": 2}, "mode is colocate, and python, restarts is set"),
        ({"sleep_level": 2}, "sleep_level is set, and rollout-vllm.sleep is false"),
        ({"url": "http://a:1", "port": 7, "python": "p"}, "url is set, and so is python, port"),
        ({"served_name": "x"}, "served_name is set without a url"),
        ({"python": "p", "command": ["vllm", "serve"]}, "are both set"),
        ({"python": "no-such-program"}, "would start 'no-such-program', which is not there"),
        ({"command": ["no-such-program", "serve"]}, "would start 'no-such-program', which is not there"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        require_usable(RolloutVllmConfig(**settings))


def test_settings_that_can_work_are_not() -> None:
    require_usable(RolloutVllmConfig(url="http://127.0.0.1:8000", served_name="x", dtype="bfloat16", sleep=True))
    require_usable(RolloutVllmConfig(python=sys.executable))


def test_the_command_line_says_what_the_config_and_the_model_say() -> None:
    config = RolloutVllmConfig(
        python="p", max_model_len=64, memory_share=0.5, tensor_parallel=2, eager=True, sleep=True, args=["--x", "1"]
    )
    words = command(config, Shape("folder", 12), 81, "bf16")
    assert words[:5] == ["p", "-m", "vllm.entrypoints.openai.api_server", "--model", "folder"]
    options = dict(pairwise(words))
    wanted = {"--dtype": "bfloat16", "--port": "81", "--max-model-len": "64", "--gpu-memory-utilization": "0.5"}
    wanted |= {"--tensor-parallel-size": "2", "--max-lora-rank": "16", "--logprobs-mode": "processed_logprobs"}
    assert {name: options[name] for name in wanted} == wanted
    assert {"--enable-lora", "--enforce-eager", "--enable-sleep-mode"} < set(words)
    assert words[-2:] == ["--x", "1"]


def test_a_model_without_adapter_is_served_without_and_vllm_is_found_on_the_path() -> None:
    words = command(RolloutVllmConfig(), Shape("folder", None), 81, "fp32")
    assert words[:3] == ["vllm", "serve", "folder"]
    assert "--enable-lora" not in words
    assert words[words.index("--dtype") + 1] == "float32"


def test_the_server_is_no_rank_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "KEPT"):
        monkeypatch.setenv(name, "1")
    made = environment(RolloutVllmConfig(env={"CUDA_VISIBLE_DEVICES": "3"}))
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"} & made.keys()
    assert (made["KEPT"], made["CUDA_VISIBLE_DEVICES"], made["VLLM_SERVER_DEV_MODE"]) == ("1", "3", "1")


def test_a_server_that_takes_broadcasts_is_told_of_its_workers_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    config = RolloutVllmConfig(transfer="broadcast")
    words = command(config, Shape("folder", None), 81, "fp32")
    assert words[words.index("--worker-extension-cls") + 1] == "pegbox_broadcast.Receiver"
    folder, rest = environment(config)["PYTHONPATH"].split(os.pathsep)
    assert (Path(folder) / "pegbox_broadcast.py").is_file()
    assert rest == "before"
    assert environment(RolloutVllmConfig())["PYTHONPATH"] == "before"
    with pytest.raises(ConfigError, match="transfer is broadcast, and the model has an adapter"):
        command(config, Shape("folder", 8), 81, "fp32")


def routed(compose_config: Any, model: Any = None, ranks: int = 1, **section: Any) -> Any:
    """The route of a run with these settings."""
    ctx = compose_config({"model": {"name": "tiny"}, "plugins": ["rollout-vllm"], "rollout-vllm": section})
    ctx.runtime = FakeRuntime()
    ctx.runtime.world_size = ranks
    return route(ctx, model or plain_model(), ctx.section(RolloutVllmConfig))


def test_several_processes_and_sharded_weights_are_refused_where_they_cannot_work(compose_config: Any) -> None:
    with pytest.raises(ConfigError, match="mode is colocate, and the run has 2 processes"):
        routed(compose_config, ranks=2, mode="colocate")
    sharded = plain_model()
    next(iter(sharded.module.parameters())).full_tensor = None  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"(?s)they are sharded over processes.*transfer to disk"):
        routed(compose_config, sharded, transfer="broadcast")
    routed(compose_config, sharded)


@pytest.mark.parametrize("way", [{"transfer": "broadcast"}, {"mode": "colocate"}])
def test_a_folder_for_weights_that_no_file_is_written_of_is_refused(compose_config: Any, way: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"weights names a folder, and weights go to vLLM from memory"):
        routed(compose_config, weights="shared", **way)


def test_a_base_model_that_is_never_sent_is_not_thrown_away(compose_config: Any) -> None:
    model = plain_model()
    model.module.peft_config = {"default": SimpleNamespace(r=4, rank_pattern={})}  # type: ignore[assignment]
    adapted = replace(model, adapter="peft", without_adapter=nullcontext)
    with pytest.raises(ConfigError, match="sleep_level is 2, and the model has an adapter"):
        routed(compose_config, adapted, sleep=True, sleep_level=2)


def test_the_rank_that_is_served_is_the_next_that_vllm_knows() -> None:
    assert [served_rank(rank) for rank in (1, 8, 9, 64, 300)] == [8, 8, 16, 64, 320]
    with pytest.raises(ConfigError, match="the adapter has rank 513"):
        served_rank(513)


def test_the_adapters_rank_is_read_from_the_module_and_doubled_where_the_base_was_changed() -> None:
    model = plain_model()
    assert shape_of(model) == Shape("plain", None)
    model.module.peft_config = {"default": SimpleNamespace(r=4, rank_pattern={"down": 12})}  # type: ignore[assignment]
    adapted = replace(model, adapter="peft", without_adapter=nullcontext)
    assert shape_of(adapted).rank == 12
    assert shape_of(replace(adapted, without_adapter=None)).rank == 24
    with pytest.raises(ConfigError, match="the adapter's format is 'other'"):
        shape_of(replace(adapted, adapter="other"))
