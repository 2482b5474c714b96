"""Weights by broadcast: the half that a trainer runs and the half that vLLM's workers run. torch alone.

The trainer (rank 0) and the workers of a vLLM (ranks 1, 2 ...) form a group of their own, apart from any group that
either has: NCCL where each has a GPU for itself, else gloo through the memory of the host. vLLM 0.32 has a protocol for
this too (`weight_transfer`), on its own wrapper of NCCL: a trainer without vLLM does not have it, and it needs GPUs.

Tensors travel in buckets, each two broadcasts: its size, then its bytes, a JSON list of (name, dtype, shape, offset)
before the tensors. A size of 0 ends an update. Neither side holds more than a bucket, or one tensor that is larger.

A server imports this file as `pegbox_broadcast`, so it imports nothing of Pegbox. Every wait has a time limit: a member
that is killed is an error on the other side (gloo: at once; NCCL: when the trainer hears that the server is gone, or
when time is up), never a hang.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
BUCKET_BYTES = 2**28
ALIGNED = 256
"""Tensors begin at multiples of so many bytes, as torch's own allocations do."""
LOOK_EVERY_S = 2e-4
TEAR_DOWN = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
CLOSE_S = 10.0


class Broken(Exception):
    """The group cannot go on: a member is gone, or took too long."""


def never() -> None:
    """Nothing else ends a wait."""


def waited(done: Callable[[], bool], limit_s: float, stop: Callable[[], None], what: str) -> None:
    """Wait until `done()`; `stop()` may raise what makes waiting pointless.

    Raises:
        Broken: it took longer than `limit_s`.
    """
    limit = time.monotonic() + limit_s
    while not done():
        stop()
        if time.monotonic() > limit:
            raise Broken(f"{what} took longer than {limit_s:g} s")
        time.sleep(LOOK_EVERY_S)


def limited(work: Callable[[], T], limit_s: float, stop: Callable[[], None], what: str) -> T:
    """Do `work` in a thread of its own: calls of torch and NCCL that wait for others cannot all be told how long."""
    box: list[T | BaseException] = []

    def run() -> None:
        try:
            box.append(work())
        except BaseException as error:
            box.append(error)

    threading.Thread(target=run, name=what, daemon=True).start()
    waited(lambda: bool(box), limit_s, stop, what)
    (result,) = box
    if isinstance(result, BaseException):
        raise Broken(f"{what}: {result}") from result
    return result


def address_towards(host: str) -> str:
    """This machine's address as `host` sees it; nothing is sent."""
    family, kind, protocol, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


class Group:
    """One member of a group. Broadcasts come from rank 0.

    Args:
        store: where the members meet; the trainer opens it before the others are told.
        host: where the trainer is.
        backend: `nccl` or `gloo`.
        device: what the member computes on; with gloo, bytes go through the host's memory.
        timeout_s: for joining, and for each bucket.
    """

    def __init__(self, store: dist.TCPStore, host: str, backend: str, device: torch.device, timeout_s: float) -> None:
        self._store, self._host, self._backend = store, host, backend
        self.device = device if backend == "nccl" else torch.device("cpu")
        self.timeout_s = timeout_s
        self._group: Any = None
        self._root = dist.BroadcastOptions()
        self._root.rootRank = 0

    def join(self, rank: int, size: int, stop: Callable[[], None] = never) -> None:
        """Meet the others.

        Raises:
            Broken: not all came in time.
        """

        def meet() -> Any:
            group = self._made(rank, size)
            hello = torch.zeros(1, device=self.device)
            group.broadcast([hello], self._root).wait(timedelta(seconds=self.timeout_s))
            return group

        self._group = limited(meet, self.timeout_s, stop, f"joining a {self._backend} group of {size}")

    def _made(self, rank: int, size: int) -> Any:
        if self._backend == "gloo":
            options = getattr(dist.ProcessGroupGloo, "_Options", None) or dist.ProcessGroupGloo.Options
            chosen = options()
            chosen._timeout = timedelta(seconds=self.timeout_s)
            chosen._devices = [dist.ProcessGroupGloo.create_device(hostname=address_towards(self._host))]
            return dist.ProcessGroupGloo(self._store, rank, size, chosen)
        chosen = dist.ProcessGroupNCCL.Options()
        chosen._timeout = timedelta(seconds=2 * self.timeout_s)
        with torch.cuda.device(self.device), errors_stay_errors():
            return dist.ProcessGroupNCCL(self._store, rank, size, chosen)

    def broadcast(self, tensor: torch.Tensor, stop: Callable[[], None] = never) -> None:
        """Send `tensor` (rank 0) or fill it; done when it is there.

        Raises:
            Broken: a member is gone, or it took too long.
        """
        try:
            work = self._group.broadcast([tensor], self._root)
            waited(work.is_completed, self.timeout_s, stop, f"a broadcast of {tensor.nbytes} bytes")
            work.wait(timedelta(seconds=self.timeout_s))
        except RuntimeError as error:
            raise Broken(str(error)) from error

    def expects(self, update: str, rank: int) -> None:
        """Say that this member waits for an update."""
        self._store.set(f"{update}/{rank}", b"")

    def expected(self, update: str, size: int, stop: Callable[[], None]) -> None:
        """Wait until all others expect it: nothing is ever sent to a member that does not listen.

        Raises:
            Broken: one does not in time.
        """
        keys = [f"{update}/{rank}" for rank in range(1, size)]
        waited(lambda: self._store.check(keys), self.timeout_s, stop, f"waiting for {size - 1} workers")

    def close(self) -> None:
        """Leave; what is under way is given up."""
        group, self._group = self._group, None
        if group is not None and self._backend == "nccl":
            try:
                limited(group.abort, CLOSE_S, never, "leaving the group")
            except Broken:
                return


@contextmanager
def errors_stay_errors() -> Iterator[None]:
    """Within it NCCL groups are made that report a dead member; by default torch would end this process instead.

    torch reads the switch from the environment, as each group is made, and nowhere else.
    """
    before = {name: value for name, value in os.environ.items() if name == TEAR_DOWN}
    os.environ.update({TEAR_DOWN: "0"})
    try:
        yield
    finally:
        os.environ.pop(TEAR_DOWN)
        os.environ.update(before)


def send(
    group: Group,
    tensors: Iterable[tuple[str, torch.Tensor, torch.dtype]],
    stop: Callable[[], None] = never,
    bucket_bytes: int | None = None,
) -> tuple[int, int]:
    """Send named tensors, each in the data type beside it; the number of tensors and of bytes.

    Raises:
        Broken: a member is gone, or a bucket took too long.
    """
    bucket: list[tuple[str, torch.Tensor, torch.dtype]] = []
    count = sent = held = 0
    for entry in tensors:
        size = entry[1].numel() * entry[2].itemsize
        if bucket and held + size > (bucket_bytes or BUCKET_BYTES):
            _send_bucket(group, bucket, stop)
            bucket, held = [], 0
        bucket.append(entry)
        count, sent, held = count + 1, sent + size, held + size
    if bucket:
        _send_bucket(group, bucket, stop)
    group.broadcast(torch.zeros(2, dtype=torch.int64, device=group.device), stop)
    return count, sent


def _send_bucket(group: Group, entries: list[tuple[str, torch.Tensor, torch.dtype]], stop: Callable[[], None]) -> None:
    places, end = [], 0
    for name, tensor, dtype in entries:
        places.append((name, str(dtype).removeprefix("torch."), list(tensor.shape), end))
        end += _aligned(tensor.numel() * dtype.itemsize)
    header = json.dumps(places).encode()
    begin = _aligned(len(header))
    bytes_ = torch.empty(begin + end, dtype=torch.uint8, device=group.device)
    bytes_[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for (_, tensor, dtype), (_, _, shape, offset) in zip(entries, places, strict=True):
        _part(bytes_, begin + offset, dtype, shape).copy_(tensor.detach())
    group.broadcast(torch.tensor([len(header), bytes_.numel()], device=group.device), stop)
    group.broadcast(bytes_, stop)


def receive(group: Group, stop: Callable[[], None] = never) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of one update, as they come, on the group's device. They stay valid: no memory is reused.

    Raises:
        Broken: the trainer is gone, or a bucket took too long.
    """
    while True:
        sizes = torch.empty(2, dtype=torch.int64, device=group.device)
        group.broadcast(sizes, stop)
        header_bytes, all_bytes = sizes.tolist()
        if all_bytes == 0:
            return
        bytes_ = torch.empty(all_bytes, dtype=torch.uint8, device=group.device)
        group.broadcast(bytes_, stop)
        begin = _aligned(header_bytes)
        for name, dtype, shape, offset in json.loads(bytes(bytes_[:header_bytes].tolist())):
            yield name, _part(bytes_, begin + offset, getattr(torch, dtype), shape)


def _part(bytes_: torch.Tensor, begin: int, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return bytes_[begin : begin + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Receiver:
    """What vLLM adds to each of its workers (`--worker-extension-cls pegbox_broadcast.Receiver`)."""

    pegbox_group: Group | None = None

    def pegbox_place(self: Any) -> dict[str, str]:
        """What this worker computes on, and in which data type."""
        device: torch.device = self.device
        dtype = str(self.model_config.dtype).removeprefix("torch.")
        return {"device": device.type, "uuid": uuid(device), "dtype": dtype}

    def pegbox_join(self: Any, host: str, port: int, size: int, backend: str, timeout_s: float) -> None:
        """Become a member of the trainer's group."""
        self.pegbox_leave()
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore(host, port, None, is_master=False, timeout=limit, wait_for_workers=False)
        group = Group(store, host, backend, self.device, timeout_s)
        group.join(self.pegbox_rank(), size)
        self.pegbox_group = group

    def pegbox_rank(self: Any) -> int:
        """The trainer is rank 0."""
        parallel = self.parallel_config
        return 1 + int(parallel.data_parallel_index * parallel.world_size + self.rank)

    def pegbox_receive(self: Any, update: str) -> dict[str, object]:
        """Load one update into the model, as a checkpoint is loaded; what came."""
        group = self.pegbox_group
        if group is None:
            raise RuntimeError("this worker is in no group")
        count = 0

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal count
            for name, tensor in receive(group):
                count += 1
                yield name, tensor

        arriving = counted()
        group.expects(update, self.pegbox_rank())
        self.reload_weights(weights_iterator=arriving)
        # What the model has no use for must not be left in the group.
        for _ in arriving:
            pass
        return {"update": update, "tensors": count}

    def pegbox_leave(self: Any) -> None:
        """Leave the group, if it is in one."""
        group, self.pegbox_group = self.pegbox_group, None
        if group is not None:
            group.close()


def uuid(device: torch.device) -> str:
    """A name of a GPU that is the same in every process; of the CPU, nothing."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
