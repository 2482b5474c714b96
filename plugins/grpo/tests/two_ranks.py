"""Run under torchrun as `two_ranks.py FOLDER`: the runs that are compared with those of one process."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from tiny_rl import config_of, run

RUNS = {
    "dapo": {"grpo": {"entropy_coef": 0.01}},
    "several": {"grpo": {"iterations": 2, "steps_per_generation": 2, "loss_type": "grpo", "top_entropy_quantile": 0.5}},
    "packed": {"tiny": {"capacity": 24, "eval_rows": 3}, "trainer": {"eval_every": 2, "micro_batch": 2}},
    "few": {"trainer": {"batch": 1}},
}


def run_all(folder: Path) -> None:
    """Every run, one after another."""
    for name, keys in RUNS.items():
        run(config_of(folder / name, **keys))


if __name__ == "__main__":
    import torch.distributed

    # One group for all runs: each would make its own, and those of one program cannot be made one after another.
    torch.distributed.init_process_group("gloo")
    run_all(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
