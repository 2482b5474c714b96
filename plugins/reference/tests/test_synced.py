"""A reference that follows the policy does so as TRL's, and a stopped run goes on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError
from pegbox.events import Event, Signal, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.run import execute
from pegbox.testing.tiny import tiny_model
from pegbox_reference.syncing import SyncedReference
from reference_rows import Tiny, Watcher, config

SYNC = {"sync_every": 2, "mixup": 0.6}


class Policies:
    """Keeps the policy's weights after each step; asks to stop after one of them."""

    def __init__(self, stop: int = 99) -> None:
        self.stop, self.weights = stop, [tiny_model(initializer_range=0.1).module.state_dict()]

    @hookimpl
    def on_event(self, event: Event) -> Signal | None:
        if isinstance(event, Stepped):
            self.weights.append({name: p.detach().clone() for name, p in event.model.module.state_dict().items()})
            return Signal.STOP if event.step == self.stop else None
        return None


def run(folder: Path, policies: Policies, tiny: Tiny | None = None, **sections: Any) -> Watcher:
    watcher, given = Watcher(), {"reference": SYNC, "steps": 6, **sections}
    plan = config(folder, "watcher", "policies", "reference", **given)
    plan |= {"resume": "auto"} if (folder / "run").exists() else {}
    instances = {"tiny": tiny or Tiny(range(12)), "watcher": watcher, "policies": policies}
    execute(compose(plan, instances=instances))
    return watcher


def test_the_reference_moves_as_trls_does(tmp_path: Path) -> None:
    from trl.trainer.callbacks import SyncRefModelCallback

    policies, tiny = Policies(), Tiny(range(12))
    run(tmp_path, policies, tiny)
    theirs, policy = (tiny_model(initializer_range=0.1).module for _ in range(2))
    for step in (2, 4, 6):
        policy.load_state_dict(policies.weights[step])
        SyncRefModelCallback._sync_target_model(policy, theirs, SYNC["mixup"])
    for name, weight in tiny.loaded[1].module.state_dict().items():
        torch.testing.assert_close(weight, theirs.state_dict()[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(tiny.loaded[1].module.lm_head.weight, policies.weights[0]["lm_head.weight"])


def test_what_a_step_is_compared_with_is_the_reference_of_that_moment(tmp_path: Path) -> None:
    watcher = run(tmp_path, Policies(), reference={"sync_every": 2, "mixup": 1.0}, trainer={"shuffle": False})
    apart = [max(float((p - r).abs().max()) for p, r in seen.values()) for seen in watcher.steps]
    assert [value < 1e-5 for value in apart] == [True, False] * 3


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_run_goes_on_to_the_same_bits(stop: int, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Policies())
    before = run(tmp_path / "parts", Policies(stop))
    after = run(tmp_path / "parts", Policies())
    files = [(tmp_path / folder / "run" / "metrics.jsonl").read_text().splitlines() for folder in ("whole", "parts")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in files]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    for first, second in zip(whole.steps, [*before.steps, *after.steps], strict=True):
        assert first.keys() == second.keys()
        assert all(torch.equal(first[row][1], second[row][1]) for row in first)


def test_a_checkpoint_before_the_first_move_holds_no_weights() -> None:
    policy, reference = tiny_model(1), tiny_model(0)
    synced = SyncedReference(policy, reference, 0.5)
    assert synced.state_dict() == {"moves": 0, "weights": {}}
    synced.move()
    other = SyncedReference(policy, tiny_model(0), 0.5)
    other.load_state_dict(synced.state_dict())
    again = other.state_dict()
    assert again["moves"] == 1
    for name, weight in synced.state_dict()["weights"].items():
        assert torch.equal(weight, again["weights"][name])


def test_models_of_other_shapes_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match="has not the parameters of"):
        SyncedReference(tiny_model(), tiny_model(num_hidden_layers=1), 0.5)
