"""Runs of two processes with every way to a reference; what each process saw goes to files.

Run as `torchrun --nproc-per-node 2 peer_references.py FOLDER`: starting processes takes longer than what they do.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from reference_rows import Tiny, Watcher, run

SEEDS, HELD_OUT = range(11), range(20, 23)
RUNS = {
    "lora-adapter": (["lora"], {"how": "adapter"}),
    "lora-copy": (["lora"], {"how": "copy"}),
    "lora-precomputed": (["lora"], {"how": "precomputed"}),
    "full-copy": ([], {"how": "copy"}),
    "full-precomputed": ([], {"how": "precomputed"}),
}


def main(folder: Path) -> None:
    for name, (plugins, section) in RUNS.items():
        watcher, reference = Watcher(), {"cache": str(folder / "cache"), **section}
        sections = {"reference": reference, "trainer": {"batch": 8, "eval_at_start": True}}
        run(folder / name, Tiny(SEEDS, HELD_OUT), *plugins, "watcher", "reference", watcher=watcher, **sections)
        seen = {row: values for step in watcher.steps for row, values in step.items()}
        torch.save({"train": seen, "eval": watcher.held_out}, folder / f"{name}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # One process group for all runs: gloo joins a second one by what the first left in the store.
    torch.distributed.init_process_group("gloo")
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
