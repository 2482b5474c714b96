"""Small checkpoints, one real vLLM server for all tests of this folder, and runs that ask it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import grpo_runs
from meddling import Proxy
from rollout_runs import SHARED, VLLM_PYTHON, StartedRun

VOCABULARY = 256


def _checkpoint(folder: Path, seed: int, vocabulary: int = VOCABULARY) -> Path:
    """A Llama of two layers with random weights, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1}
    ids = {"eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0, "vocab_size": vocabulary}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**shape, **heads, **ids)).save_pretrained(folder)
    words = ("<pad>", "<end>", *(f"w{number}" for number in range(2, vocabulary)))
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("base"), seed=0)


@pytest.fixture(scope="session")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same shape."""
    return _checkpoint(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def wider_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a larger vocabulary."""
    return _checkpoint(tmp_path_factory.mktemp("wider"), seed=0, vocabulary=VOCABULARY + 44)


@pytest.fixture(scope="session")
def served(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real vLLM that serves `base` in float32 and takes adapters, and full weights in every way."""
    from pegbox_rollout_vllm.client import Client
    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.options import Shape
    from pegbox_rollout_vllm.server import OwnServer

    assert VLLM_PYTHON.exists(), "vLLM is not installed; type: make vllm"
    log = tmp_path_factory.mktemp("served") / "server.log"
    server = OwnServer(RolloutVllmConfig(**SHARED), Shape(str(base), 4), "fp32", log)
    server.start()
    try:
        assert Client(server.url, 60.0).wait(lambda: server.alive, 240.0), server.last_lines()
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="session")
def undisturbed(served: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The rewards of a run with nothing in its way."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert grpo_runs.run(folder, base, grpo_runs.Rewarding(), url=served).reason == "finished"
    return grpo_runs.rewards(folder)


@pytest.fixture
def started(base: Path, tmp_path: Path) -> Iterator[Callable[..., StartedRun]]:
    """`started(lora=True, model=base, **settings)`: a run that has started; closed with the test."""
    runs: list[StartedRun] = []

    def start(*, lora: bool = True, model: Path = base, **section: Any) -> StartedRun:
        torch.set_num_threads(1)
        runs.append(StartedRun(tmp_path / f"run-{len(runs)}", model, lora=lora, **section))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="session")
def _proxies() -> Iterator[ExitStack]:
    """Proxies outlive their tests: a run that closes asks its server once more."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def proxy(served: str, _proxies: ExitStack) -> Proxy:
    """A proxy before the server, which does nothing yet."""
    made = Proxy(served)
    _proxies.callback(made.close)
    return made


@pytest.fixture
def listed(served: str) -> Callable[[], list[str]]:
    """Names that the server lists."""
    from pegbox_rollout_vllm.client import Client

    def names() -> list[str]:
        return sorted(card["id"] for card in Client(served, 60.0).get("/v1/models")["data"])

    return names


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[object], Path]:
    """Write a JSON file for another process."""

    def write(value: object) -> Path:
        path = tmp_path / "recorded.json"
        path.write_text(json.dumps(value), encoding="utf-8")
        return path

    return write
