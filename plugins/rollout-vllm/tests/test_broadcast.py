"""Weights through a group of gloo: every bit arrives, and whoever is gone or silent is an error within the time limit.

Members are threads here, each with a connection of its own; with a real vLLM they are processes (`tests/vllm`).
"""

from __future__ import annotations

import ast
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pegbox_rollout_vllm.worker import pegbox_broadcast
from pegbox_rollout_vllm.worker.pegbox_broadcast import Broken, Group, Receiver, never, receive, send

HOST = "127.0.0.1"
CPU = torch.device("cpu")
TENSORS = {
    "embed": torch.randn(40, 16),
    "layers.0.norm": torch.randn(16, dtype=torch.float64),
    "layers.0.bias": torch.randn(()),
    "layers.0.nothing": torch.randn(0, 4),
    "layers.0.transposed": torch.randn(8, 16).T,
    "layers.1.half": torch.randn(7, dtype=torch.bfloat16),
    "layers.1.count": torch.arange(5),
}


def entries() -> list[tuple[str, torch.Tensor, torch.dtype]]:
    return [(name, tensor, tensor.dtype) for name, tensor in TENSORS.items()]


class Members:
    """A trainer, and receivers in threads that do what they are told once they have joined."""

    def __init__(self, receivers: int, do: Callable[[Group, int], Any], timeout_s: float = 5.0) -> None:
        limit = timedelta(seconds=timeout_s)
        store = dist.TCPStore(HOST, 0, None, is_master=True, timeout=limit, wait_for_workers=False)
        self.trainer = Group(store, HOST, "gloo", CPU, timeout_s)
        self.results: dict[int, Any] = {}

        def member(rank: int) -> None:
            own = dist.TCPStore(HOST, store.port, None, is_master=False, timeout=limit, wait_for_workers=False)
            group = Group(own, HOST, "gloo", CPU, timeout_s)
            group.join(rank, receivers + 1)
            try:
                self.results[rank] = do(group, rank)
            except Broken as error:
                self.results[rank] = error

        self._threads = [threading.Thread(target=member, args=(rank,)) for rank in range(1, receivers + 1)]
        for thread in self._threads:
            thread.start()
        self.trainer.join(0, receivers + 1)

    def ended(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join()
        return self.results


@pytest.mark.parametrize("bucket_bytes", [1, 600, 2**20])
def test_every_bit_arrives_at_every_member_whatever_the_buckets(bucket_bytes: int) -> None:
    def listen(group: Group, rank: int) -> dict[str, torch.Tensor]:
        for update in ("first", "second"):
            group.expects(update, rank)
            found = dict(receive(group))
        return found

    members = Members(2, listen)
    for update in ("first", "second"):
        members.trainer.expected(update, 3, never)
        sent = send(members.trainer, entries(), bucket_bytes=bucket_bytes)
        assert sent == (len(TENSORS), sum(tensor.nbytes for tensor in TENSORS.values()))
    for found in members.ended().values():
        assert list(found) == list(TENSORS)
        for name, tensor in TENSORS.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_tensors_travel_in_the_data_type_that_is_asked_for() -> None:
    members = Members(1, lambda group, _: dict(receive(group)))
    send(members.trainer, [("weight", TENSORS["embed"], torch.bfloat16)])
    (found,) = members.ended().values()
    assert torch.equal(found["weight"], TENSORS["embed"].to(torch.bfloat16))


def test_neither_side_holds_more_than_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    broadcast = Group.broadcast
    monkeypatch.setattr(
        Group, "broadcast", lambda self, tensor, *rest: (sizes.append(tensor.nbytes), broadcast(self, tensor, *rest))
    )
    many = [(f"layers.{index}", torch.randn(64, 64), torch.float32) for index in range(64)]
    members = Members(1, lambda group, _: sum(1 for _ in receive(group)))
    send(members.trainer, many, bucket_bytes=2**16)
    assert members.ended() == {1: 64}
    assert max(sizes) <= 2**16 + 2**12


def test_a_member_that_leaves_in_the_middle_is_an_error_at_once() -> None:
    def leave(group: Group, _: int) -> None:
        next(receive(group))
        group._group = None

    members = Members(1, leave)
    many = [(f"layers.{index}", torch.randn(256, 256), torch.float32) for index in range(64)]
    begun = time.monotonic()
    with pytest.raises(Broken, match=r"closed|reset"):
        send(members.trainer, many, bucket_bytes=2**16)
    assert time.monotonic() - begun < 3


def test_a_trainer_that_falls_silent_is_an_error_after_the_time_limit() -> None:
    members = Members(1, lambda group, _: list(receive(group)), timeout_s=1.0)
    (error,) = members.ended().values()
    assert isinstance(error, Broken)


def test_nothing_is_sent_to_a_member_that_does_not_listen() -> None:
    members = Members(1, lambda group, rank: None, timeout_s=1.0)
    with pytest.raises(Broken, match="waiting for 1 workers took longer than 1 s"):
        members.trainer.expected("update", 2, never)

    def stop() -> None:
        raise Broken("the server says that it is done")

    with pytest.raises(Broken, match="says that it is done"):
        members.trainer.expected("update", 2, stop)
    members.ended()


def test_members_that_never_come_are_an_error_after_the_time_limit() -> None:
    limit = timedelta(seconds=1)
    store = dist.TCPStore(HOST, 0, None, is_master=True, timeout=limit, wait_for_workers=False)
    begun = time.monotonic()
    with pytest.raises(Broken, match="joining a gloo group of 2"):
        Group(store, HOST, "gloo", CPU, 1.0).join(0, 2)
    assert time.monotonic() - begun < 4


def test_the_default_group_is_not_touched() -> None:
    members = Members(1, lambda group, _: list(receive(group)))
    send(members.trainer, entries())
    members.ended()
    assert not dist.is_initialized()


def test_the_workers_file_stands_alone() -> None:
    """vLLM's environment has no Pegbox."""
    tree = ast.parse(Path(pegbox_broadcast.__file__).read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= {"torch", *sys.stdlib_module_names}


def test_what_is_added_to_vllms_workers_cannot_meet_names_of_theirs() -> None:
    added = {name for name in vars(Receiver) if not name.startswith("__")}
    assert all(name.startswith("pegbox_") for name in added)
