"""Losses, gradients and weights equal those of transformers' Trainer on the same rows, however a step is split.

Both train all parameters of a tiny random Llama for 20 steps, with AdamW, decay, warmup and clipping. Trainer
divides by the number of trained tokens of the whole step (`num_items_in_batch`), as we do; it pads and orders rows
in its own way.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from peer_runs import assert_same_training, train_with_pegbox, train_with_transformers


@pytest.mark.parametrize(("accumulation", "micro_batch"), [(1, 4), (4, 2)])
def test_one_process_trains_as_transformers_trainer(tmp_path: Path, accumulation: int, micro_batch: int) -> None:
    rows = 7 * accumulation * micro_batch + 3
    theirs = train_with_transformers(tmp_path / "theirs", accumulation, micro_batch, rows)
    ours = train_with_pegbox(tmp_path / "ours", accumulation, micro_batch, rows)
    assert_same_training(ours, theirs)
