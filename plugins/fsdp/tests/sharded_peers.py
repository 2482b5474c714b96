"""Every sharded run of two processes, in one start: `torchrun --nproc-per-node 2 sharded_peers.py FOLDER`."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from sharded_runs import HALF, STEPS, Counting, Second, config, run

VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": ((), {}),
    "full-kept": ((), {"fsdp": {"reshard_after_forward": False, "accumulate": "shards", "load": "every"}}),
    "full-copies": ((), {"fsdp": {"replicas": 2}}),
    "packed": (("packing",), {"packing": {"length": 48}, "trainer": {"batch": 4, "micro_batch": 1}}),
    # Of two processes one has no rows: it takes part in gathering all the same, in the trial of packed rows too.
    "packed-thin": (("packing",), {"packing": {"length": 48}, "trainer": {"batch": 1, "max_steps": 3}}),
    "lora": (("lora", "activations"), {}),
    "lora-kept": (("lora",), {"fsdp": {"reshard_after_forward": False}}),
    "layers": (("lora",), {"fsdp": {"layers": r".*\.(self_attn|mlp)"}}),
    "compiled": (("lora", "activations", "compile"), {"compile": {"backend": "eager"}}),
    "reentrant": (("activations",), {"activations": {"reentrant": True}}),
    "offloaded": (("lora", "activations"), {"activations": {"offload": "cpu", "offload_min_bytes": 0}}),
    "schedule-free": (
        ("optim", "schedule-free"),
        {"optim": {"name": "schedule_free_adamw", "learning_rate": 1e-2, "schedule": "constant"}},
    ),
    "packed-state": (
        ("optim", "torchao-optim"),
        {"optim": {"name": "adamw_torchao_8bit", "learning_rate": 1e-2, "schedule": "constant"}},
    ),
    "neftune": (("lora", "neftune"), {"trainer": {"max_steps": 2}}),
}
RESUMED = ("full", "lora", "packed-state")
SLOW = ("packed-state",)
"""torchao compiles its steps."""


def main(folder: Path, slow: bool) -> None:
    base = folder / "base"
    chosen = {name: variant for name, variant in VARIANTS.items() if (name in SLOW) is slow}
    for name, (plugins, sections) in chosen.items():
        run(config(base_of(folder, name), folder / name, *plugins, **sections))
    for name in (name for name in RESUMED if name in chosen):
        plugins, sections = VARIANTS[name]
        for steps, resume in ((HALF, None), (STEPS, "auto")):
            again = {**sections, "trainer": {**sections.get("trainer", {}), "max_steps": steps}, "resume": resume}
            run(config(base_of(folder, name), folder / f"{name}-parted", *plugins, **again))
    if slow:
        return
    run(config(base, folder / "two-to-one", trainer={"max_steps": HALF}))
    run(config(base, folder / "one-to-two", resume="auto"))
    run(config(base, folder / "counted", "counting", "lora", "activations"), counting=Counting())
    run(config(base, folder / "second", "second", trainer={"max_steps": 1}), second=Second())
    load_deep(folder)


def base_of(folder: Path, name: str) -> Path:
    """torchao compiles its steps for shards of one size, so there the shards are even."""
    return folder / ("deep" if name == "packed-state" else "base")


def load_deep(folder: Path) -> None:
    """Two steps of a deeper model; how many bytes of weights the process held whenever a tensor was sent."""
    held: list[int] = []
    plain = torch.distributed.broadcast

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.ndim > 1:
            held.append(live_bytes())
        return plain(tensor, *args, **kwargs)

    torch.distributed.broadcast = counting
    # What is there already is not looked at again.
    gc.collect()
    gc.freeze()
    run(config(folder / "deep", folder / "loaded", trainer={"max_steps": 2}))
    torch.distributed.broadcast = plain
    (folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps(max(held)))


def live_bytes() -> int:
    """Bytes of all tensors with values in this process, each memory once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, torch.nn.Parameter)]
    stores = [tensor.untyped_storage() for tensor in found if tensor.device.type == "cpu"]
    return sum({store.data_ptr(): store.nbytes() for store in stores}.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    # One process group for all runs: gloo joins a second one by what the first left in the store.
    torch.distributed.init_process_group("gloo")
    main(Path(sys.argv[1]), slow="slow" in sys.argv)
    sys.stdout.flush()
    os._exit(0)
