"""Whole runs train the same with and without the plugin; what cannot be is said before a run begins."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError, UserError
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_cce import CcePlugin
from pegbox_cce.expected import Expected
from pegbox_cce.requirements import require_library, require_served
from safetensors.torch import load_file

TinyRun = Callable[..., dict[str, Any]]


def losses(output: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kind", ["tied", "capped"])
def test_a_run_trains_the_same_without_it(kind: str, uniform: bool, tiny_run: TinyRun, monkeypatch) -> None:
    """All parameters trained; with and without the promise that a loss may make."""
    plugin = CcePlugin()
    if uniform:
        monkeypatch.setattr(plugin.expected, "learn", lambda loss: setattr(plugin.expected, "uniform", True))
    without = tiny_run("without", kind)
    fused = tiny_run("fused", kind, ("cce",), cce={"logits_gib": 1e-5})
    execute(compose(without))
    execute(compose(fused, instances={"cce": plugin}))
    torch.testing.assert_close(losses(fused["output"]), losses(without["output"]), rtol=1e-4, atol=1e-5)
    weights = [load_file(Path(config["output"]) / "model.safetensors") for config in (fused, without)]
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_the_promise_is_what_the_loss_says() -> None:
    expected = Expected()
    for said in (True, False):
        expected.learn(SimpleNamespace(needs={"logps", "entropy"}, uniform=said, entropy_gradient=said))
        assert (expected.uniform, expected.entropy_gradient) == (said, said)
    expected.learn(SimpleNamespace(needs={"logps"}))
    assert not expected.uniform


def test_a_loss_that_needs_what_cannot_be_given_is_refused() -> None:
    def loss(*needs: str) -> Any:
        return SimpleNamespace(needs=frozenset(needs))

    require_served("pegbox", loss("logps", "entropy"), "fp32")
    with pytest.raises(ConfigError, match="needs all logits"):
        require_served("pegbox", loss("logits"), "bf16")
    with pytest.raises(ConfigError, match="needs entropy"):
        require_served("liger", loss("entropy"), "bf16")
    with pytest.raises(ConfigError, match="computes in fp32"):
        require_served("apple", loss("logps"), "fp32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("implementation", ["apple", "liger"])
def test_another_librarys_kernel_without_a_gpu_is_refused_before_anything_is_read(
    implementation: str, tiny_run: TinyRun
) -> None:
    config = tiny_run("never", plugins=("cce",), cce={"implementation": implementation})
    with pytest.raises(ConfigError, match=r"not installed|there is no GPU"):
        execute(compose(config))
    require_library("pegbox")


def test_settings_of_ours_with_another_implementation_are_refused(tiny_run: TinyRun) -> None:
    with pytest.raises(UserError, match="logits_gib is for implementation pegbox, not liger"):
        compose(tiny_run("never", plugins=("cce",), cce={"implementation": "liger", "logits_gib": 1.0}))


def test_a_head_that_fsdp_gathers_is_trained_the_same(tiny_run: TinyRun) -> None:
    pytest.importorskip("pegbox_fsdp")
    use = {"use": {"place_model": "fsdp"}}
    without = tiny_run("without", "tied", ("fsdp",), **use)
    fused = tiny_run("fused", "tied", ("cce", "fsdp"), cce={"logits_gib": 1e-5}, **use)
    for config in (without, fused):
        execute(compose(config))
    torch.testing.assert_close(losses(fused["output"]), losses(without["output"]), rtol=1e-4, atol=1e-5)
