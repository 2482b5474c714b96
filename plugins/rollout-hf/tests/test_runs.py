"""Rollouts in the middle of real trainings: the run is what it is without them, and its plugins do not change them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.events import Event, RunStarted, Stepped
from pegbox.plan import compose
from pegbox.rollouts import RolloutBatch, WeightUpdate
from pegbox.run import execute
from pegbox.testing.tiny import ByteTokenizer, tiny_processor
from pegbox.types import Processor
from rollout_policy import request
from safetensors.torch import load_file

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")


class Kept(ByteTokenizer):
    """An export writes the tokenizer too."""

    def save_pretrained(self, folder: object) -> tuple[str, ...]:
        return ()


class Bytes:
    """Gives the tiny run a tokenizer, and asks for rollouts after each step."""

    def __init__(self, asks: bool) -> None:
        self.asks, self.made = asks, list[tuple[RolloutBatch, Any]]()

    @hooks.hookimpl(wrapper=True)
    def load_processor(self) -> Generator[None, Processor, Processor]:
        made = yield
        tokenizer: Any = Kept()
        return replace(tiny_processor(), tokenizer=tokenizer, pad_id=made.pad_id)

    @hooks.hookimpl
    def on_event(self, ctx: Any, event: Event) -> None:
        if not self.asks or not isinstance(event, RunStarted | Stepped):
            return
        module = event.model.module if isinstance(event, Stepped) else event.job.model.module
        trained = ((name, one.detach()) for name, one in module.named_parameters() if one.requires_grad)
        version = event.step
        ((_, receipt),) = ctx.each(hooks.sync_weights, ctx, WeightUpdate(version=version, kind="full", tensors=trained))
        assert receipt.version == version
        batch = ctx.call(hooks.generate_rollouts, ctx, request(samples=2, temperature=0.8, max_tokens=5))
        taught = [self._taught(module, rollout) for rollout in batch.rollouts]
        self.made.append((batch, taught))

    @staticmethod
    def _taught(module: Any, rollout: Any) -> torch.Tensor:
        """Log-probabilities by one forward in evaluation mode."""
        ids = torch.tensor([[*rollout.prompt, *rollout.completion]])
        training = [part for part in module.modules() if part.training]
        module.eval()
        with torch.no_grad():
            logps_TV = (module(input_ids=ids, use_cache=False).logits[0].float() / 0.8).log_softmax(-1)
        for part in training:
            part.training = True
        return logps_TV[len(rollout.prompt) - 1 : -1].gather(1, ids[0, len(rollout.prompt) :, None])[:, 0]


def run(folder: Path, asks: bool, plugins: dict[str, Any]) -> tuple[Bytes, dict[str, torch.Tensor]]:
    probe = Bytes(asks)
    config = {
        "model": {"name": "tiny"},
        "plugins": [*(["rollout-hf"] if asks else []), TINY, "bytes", *plugins, "sft", "adamw", "trainer"],
        "tiny_llama": {"rows": 16, "dropout": 0.1, "shortest": 8},
        "trainer": {"progress": "none", "max_steps": 3, "save_every": None, "device": "cpu"},
        "adamw": {"learning_rate": 1e-2},
        **{name: section for name, section in plugins.items() if section},
        "output": str(folder),
    }
    execute(compose(config, instances={"bytes": probe}))
    (weights,) = (load_file(path) for path in folder.glob("*model.safetensors"))
    return probe, weights


@pytest.mark.parametrize(
    "plugins",
    [{}, {"lora": {"r": 4, "dropout": 0.1}}, {"activations": {"policy": "full"}}],
    ids=lambda plugins: "-".join(plugins) or "plain",
)
def test_a_run_is_the_same_with_and_without_rollouts(tmp_path: Path, plugins: dict[str, Any]) -> None:
    _, without = run(tmp_path / "without", False, plugins)
    probe, with_rollouts = run(tmp_path / "with", True, plugins)
    assert all(torch.equal(with_rollouts[name], tensor) for name, tensor in without.items())
    assert [batch.rollouts[0].first_version for batch, _ in probe.made] == [0, 1, 2, 3]
    for batch, taught in probe.made:
        for rollout, expected in zip(batch.rollouts, taught, strict=True):
            assert torch.allclose(torch.tensor(rollout.logps), expected, atol=1e-5, rtol=0)
    logps = [batch.rollouts[0].logps for batch, _ in probe.made]
    assert len(set(logps)) == 4, "the weights that sample are those that train"
