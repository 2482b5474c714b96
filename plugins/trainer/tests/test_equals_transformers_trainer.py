"""Losses, gradients and weights equal those of transformers' Trainer on the same rows, however a step is split.

Both train all parameters of a tiny random Llama for 20 steps, with AdamW, decay, warmup and clipping. Trainer divides by
the number of trained tokens of the whole step (`num_items_in_batch`), as we do; it pads and orders rows in its own way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from peer_runs import train_with_pegbox, train_with_transformers


def assert_same_training(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert len(ours["losses"]) == len(theirs["losses"]) == 20
    torch.testing.assert_close(torch.tensor(ours["losses"]), torch.tensor(theirs["losses"]), rtol=2e-6, atol=0)
    torch.testing.assert_close(torch.tensor(ours["norms"]), torch.tensor(theirs["norms"]), rtol=2e-5, atol=0)
    assert ours["gradient"].keys() == theirs["gradient"].keys() == ours["weights"].keys()
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, gradient in ours["gradient"].items():
        torch.testing.assert_close(gradient, theirs["gradient"][name], rtol=1e-4, atol=1e-7)
    start = dict(tiny_llama.build_model().named_parameters())
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=1e-4, atol=2e-6)
        assert (weight - start[name]).abs().max() > 1e-3, "and training moved it far beyond the tolerance"


@pytest.mark.parametrize(("accumulation", "micro_batch"), [(1, 4), (4, 2)])
def test_one_process_trains_as_transformers_trainer(
    tmp_path: Path, accumulation: int, micro_batch: int
) -> None:
    rows = 7 * accumulation * micro_batch + 3
    theirs = train_with_transformers(tmp_path / "theirs", accumulation, micro_batch, rows)
    ours = train_with_pegbox(tmp_path / "ours", accumulation, micro_batch, rows)
    assert_same_training(ours, theirs)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["1x4", "4x1"])
def test_two_processes_train_as_transformers_trainer(two_processes: Path, name: str) -> None:
    both = torch.load(two_processes / f"{name}.pt", weights_only=True)
    assert_same_training(both["ours"], both["theirs"])


@pytest.mark.distributed
def test_two_processes_train_as_one_on_the_same_global_batch(tmp_path: Path, two_processes: Path) -> None:
    alone = train_with_pegbox(tmp_path / "alone", accumulation=8, micro_batch=1, rows=160)
    assert_same_training(torch.load(two_processes / "4x1.pt", weights_only=True)["ours"], alone)
