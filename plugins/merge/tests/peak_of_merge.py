"""A process of its own: merges a run and prints by how many bytes its memory grew at the most."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from pegbox_merge.merging import MergeRequest, write_merged
from pegbox_merge.runs import open_run


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main(warm_up: str, run: str, shard: str) -> None:
    torch.set_num_threads(1)
    write_merged(open_run(Path(warm_up)), MergeRequest(Path(warm_up) / "merged"))
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    done = write_merged(open_run(Path(run)), MergeRequest(Path(run) / "merged", max_shard_size=shard))
    print(json.dumps({"grown": status("VmHWM") - before, "shards": done.shards}))


if __name__ == "__main__":
    main(*sys.argv[1:])
