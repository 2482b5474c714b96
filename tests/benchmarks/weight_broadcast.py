"""Measures how long full weights take from a trainer to a vLLM worker: by broadcast, beside by way of a folder.

    python tests/benchmarks/weight_broadcast.py [--gib 16] [--rounds 3] [--trained float32] [--write CSV] [--folder F]

Two processes, without vLLM: the trainer's half is `rollout-vllm`'s own, group, tensors and all; the other one answers
with the very methods that vLLM adds to its workers. In place of vLLM's `reload_weights` stands a loop that copies each
tensor into one that is there, so layers that vLLM packs or quantizes take longer. Where there are two GPUs each has one
and NCCL carries the bytes; on one GPU and on CPUs gloo does. The model is a Llama with the shapes of the 8B (narrower
ones below 4 GiB) and as many layers as make up `--gib` GiB in bfloat16, which is what is sent. Every round has new
weights, and all bits are compared.

The folder is written as at the end of a run, named by its digest, read by the worker and copied; `--folder` says where.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pegbox_rollout_vllm.broadcast import Broadcast
from pegbox_rollout_vllm.cargo import Folder, Live
from pegbox_rollout_vllm.client import Refused, ServerGone
from pegbox_rollout_vllm.live import LiveWeights
from pegbox_rollout_vllm.worker.pegbox_broadcast import Receiver
from safetensors import safe_open

SENT = torch.bfloat16
HEAD = ["way", "carried_by", "gib", "tensors", "trained", "seconds", "gb_per_s", "all_seconds"]
HEAD += ["trainer", "worker", "torch", "commit", "date"]


def llama(gib: float, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """A Llama of about `gib` GiB in bfloat16; its weights are whatever the memory holds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    small = gib < 4
    shape = {"hidden_size": 512 if small else 4096, "intermediate_size": 1792 if small else 14336}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 16032 if small else 128256}

    def made(layers: int) -> torch.nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig(**shape, **heads, num_hidden_layers=layers))

    def size(layers: int) -> int:
        return sum(parameter.numel() for parameter in made(layers).parameters()) * SENT.itemsize

    layers = max(1, round((gib * 2**30 - size(0)) / (size(1) - size(0))))
    return made(layers).to(dtype).to_empty(device=device)


def fill(tensors: Mapping[str, torch.Tensor], number: int) -> None:
    """The weights of a round: the same in every process on the same kind of device."""
    for index, tensor in enumerate(tensors.values()):
        generator = torch.Generator(tensor.device).manual_seed(1000 * number + index)
        with torch.no_grad():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=SENT))


class Worker(Receiver):
    """What `Receiver` asks of a worker of vLLM."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank = device, 0
        self.parallel_config = SimpleNamespace(data_parallel_index=0, world_size=1)
        self.model_config = SimpleNamespace(dtype=SENT)
        self.held: dict[str, torch.Tensor] = {}

    def hold(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self.held = {name: torch.empty(shape, dtype=SENT, device=self.device) for name, shape in shapes.items()}

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights_iterator:
            self.held[name].copy_(tensor)
        self._finish()

    def read(self, folder: str) -> None:
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    self.held[name].copy_(file.get_tensor(name))
        self._finish()

    def wrong(self, number: int) -> list[str]:
        """Names of tensors that differ in any bit from those of the round."""
        expected = {name: torch.empty_like(tensor) for name, tensor in self.held.items()}
        fill(expected, number)
        return [name for name, tensor in self.held.items() if not torch.equal(tensor, expected[name])]

    def _finish(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def serve(pipe: Pipe, device: str) -> None:
    """The worker's process: answers one call after the other."""
    worker = Worker(torch.device(device))
    if worker.device.type == "cuda":
        torch.cuda.set_device(worker.device)
    while (asked := pipe.recv()) is not None:
        method, told = asked
        try:
            pipe.send((getattr(worker, method)(**told), None))
        except Exception as error:
            pipe.send((None, repr(error)))


class Client:
    """Speaks with the worker's process as `client.Client` does with a server, as far as `Broadcast` asks."""

    url = "http://127.0.0.1:0"

    def __init__(self, pipe: Pipe) -> None:
        self._pipe, self._lock = pipe, threading.Lock()

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float | None = None) -> dict[str, Any]:
        with self._lock:
            try:
                self._pipe.send((body["method"], body.get("kwargs", {})))
                result, error = self._pipe.recv()
            except (EOFError, OSError) as gone:
                raise ServerGone(repr(gone)) from gone
        if error is not None:
            raise Refused(path, 500, error)
        return {"results": [result]}

    def ask(self, method: str, **told: object) -> Any:
        return self.post("/collective_rpc", {"method": method, "kwargs": told})["results"][0]

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is broken off."""


class Trainer:
    """The trainer's process: the weights, and both ways."""

    def __init__(self, options: argparse.Namespace, client: Client, device: torch.device, place: Path) -> None:
        self._client = client
        module = llama(options.gib, device, getattr(torch, options.trained))
        self._module, self._weights = module, LiveWeights(module)
        self._folder = place / "round"
        connection = SimpleNamespace(
            client=client,
            met=1,
            title="the worker",
            told=lambda path, body, *_: client.post(path, body),
        )
        self._broadcast = Broadcast(connection, device, 600.0)  # type: ignore[arg-type]
        shapes = {name: tuple(self._weights[name].shape) for name in self._weights}
        client.ask("hold", shapes=shapes)
        self.tensors = len(shapes)
        self.bytes = sum(tensor.numel() for tensor in module.state_dict().values()) * SENT.itemsize

    def new_weights(self, number: int) -> None:
        fill(dict(self._weights), number)
        if next(self._module.parameters()).is_cuda:
            torch.cuda.synchronize()

    def by_broadcast(self) -> None:
        self._broadcast("round", Live(self._weights, [0.0]))

    def by_folder(self) -> None:
        self._folder.mkdir(parents=True)
        self._module.save_pretrained(self._folder)  # type: ignore[operator]
        cargo = Folder(self._folder, temporary=True)
        cargo.seal("v1")
        self._client.ask("read", folder=str(cargo.path))
        cargo.discard()

    @property
    def carried_by(self) -> str:
        group = self._broadcast._group
        return "" if group is None else group._backend


def seconds(work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(trainer: Trainer, client: Client, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, taken in turn; the first round of each, with the joining of the group, is left out."""
    ways = {"broadcast": trainer.by_broadcast, "folder": trainer.by_folder}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    number = 0
    for each in range(rounds + 1):
        for name, way in ways.items():
            number += 1
            trainer.new_weights(number)
            took = seconds(way)
            wrong = client.ask("wrong", number=number)
            assert not wrong, f"{len(wrong)} tensors differ after {name}, first {wrong[0]}"
            print(f"round {each} {name}: {took:.3f} s{'' if each else ' (first, not counted)'}", flush=True)
            if each:
                taken[name].append(took)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=16.0, help="GiB that are sent, in bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained", choices=["bfloat16", "float32"], default="bfloat16", help="what the trainer holds")
    parser.add_argument("--folder", help="where the folder is written; none: a temporary place")
    parser.add_argument("--write", type=Path, metavar="CSV")
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    devices = ["cuda:0", f"cuda:{min(gpus, 2) - 1}"] if gpus else ["cpu", "cpu"]
    place = Path(options.folder or tempfile.mkdtemp(prefix="weight-broadcast-"))

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    worker = context.Process(target=serve, args=(theirs, devices[1]), daemon=True)
    worker.start()
    theirs.close()
    try:
        client = Client(pipe)
        trainer = Trainer(options, client, torch.device(devices[0]), place)
        taken = measure(trainer, client, options.rounds)
    finally:
        pipe.send(None)
        worker.join(30)
        shutil.rmtree(place / "round", ignore_errors=True)
    names = [torch.cuda.get_device_name(device) if gpus else "CPU" for device in devices]
    commit = options.commit or subprocess.getoutput("git describe --always --dirty")
    where = [*names, torch.__version__, commit, datetime.now(UTC).date().isoformat()]
    rows = []
    for way, each in taken.items():
        median = statistics.median(each)
        carried = trainer.carried_by if way == "broadcast" else "safetensors"
        speed = trainer.bytes / median / 1e9
        size = f"{trainer.bytes / 2**30:.2f}"
        every = " ".join(f"{one:.3f}" for one in each)
        figures = [size, trainer.tensors, options.trained, f"{median:.3f}", f"{speed:.2f}", every]
        rows.append([way, carried, *figures, *where])
        print(f"{way:10} {carried:12} {size} GiB  {median:8.3f} s  {speed:8.2f} GB/s  (all bits equal)")
    if options.write is not None:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        with options.write.open("w", newline="") as file:
            csv.writer(file).writerows([HEAD, *rows])


if __name__ == "__main__":
    main()
