"""States on disk: plain data and tensors, written by `torch.save` and read without running code.

A checkpoint is read with `weights_only=True`, so that opening one never executes what is in it. What such a
read would refuse is refused when it is written, by name, and not after the machine has failed.
"""

from __future__ import annotations

import os
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from pegbox.errors import PluginError, RunError

FOLDER = "checkpoints"
"""Where the checkpoints of a run lie, each in a folder of its own."""
PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device, torch.Size,
)  # fmt: skip


def write_state(path: Path, state: object, owner: str) -> None:
    """Write a state; `owner` says whose it is in messages.

    Raises:
        PluginError: it holds something else than plain data and tensors.
    """
    wrong = _first_not_plain(state, "")
    if wrong is not None:
        place, value = wrong
        raise PluginError(
            f"{owner} holds a {type(value).__module__}.{type(value).__qualname__} at {place or 'its top'}",
            "A checkpoint holds plain data and tensors only, so that reading one never runs code.",
            "Let state_dict return numbers, strings, lists, dicts and tensors.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def read_state(path: Path) -> dict[str, Any]:
    """Read a state back, tensors on the CPU.

    Raises:
        RunError: the file is damaged.
    """
    with undamaged(path):
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Reading a file of a checkpoint, within which any failure means that it is damaged."""
    try:
        yield
    except Exception as error:  # whatever the readers of JSON, zip files, pickles and safetensors raise
        own = next((folder for folder in path.parents if folder.parent.name == FOLDER), path.parent)
        others = sorted(other.name for other in own.parent.glob("step-*") if other != own)
        raise RunError(
            f"{path} cannot be read: {(str(error) or type(error).__name__).splitlines()[0]}",
            "It was whole when it was written: the checkpoint is damaged.",
            f"Type resume=NAME with another checkpoint: {', '.join(others)}" if others else "Start a new run.",
        ) from error


def _first_not_plain(value: object, place: str) -> tuple[str, object] | None:
    if isinstance(value, PLAIN) and not isinstance(value, numpy.generic):
        return None
    inner: list[tuple[str, object]]
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        inner = [(f"{place}[{key!r}]", part) for key, part in value.items()]
        inner += [(f"a key of {place or 'its top'}", key) for key in value]
    elif isinstance(value, list | tuple | set) and type(value) in (list, tuple, set):
        inner = [(f"{place}[{index}]", part) for index, part in enumerate(value)]
    else:
        return place, value
    return next((found for at, part in inner if (found := _first_not_plain(part, at))), None)


def random_state(device: torch.device) -> dict[str, Any]:
    """The global generators of this process: Python's, numpy's, torch's, and the device's."""
    numpys = numpy.random.get_state(legacy=False)
    numpys["state"]["key"] = torch.from_numpy(numpys["state"]["key"].astype("int64"))
    state = {"python": random.getstate(), "numpy": numpys, "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global generators where `random_state` found them."""
    random.setstate(state["python"])
    numpys = state["numpy"]
    numpy.random.set_state({**numpys, "state": {**numpys["state"], "key": numpys["state"]["key"].numpy()}})
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def sync_tree(folder: Path) -> None:
    """Wait until everything below a folder, and the folder itself, would survive a power cut."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
