"""Full weights to a server by broadcast: the trainer's first rank and the server's workers in a group of their own.

The workers are told by HTTP what to do; the bytes go through the group (`worker/pegbox_broadcast.py`). Each request is
answered when the workers are done, so it is asked in a thread while this one joins or sends; a server that dies breaks
off the answer, and that ends the sending.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from pegbox.errors import ConfigError, RunError

from pegbox_rollout_vllm.cargo import Cargo, Live
from pegbox_rollout_vllm.client import Refused, ServerGone
from pegbox_rollout_vllm.worker.pegbox_broadcast import Broken, Group, address_towards, send, uuid

if TYPE_CHECKING:
    from pegbox_rollout_vllm.connection import Connection

Stop = Callable[[], None]
BUCKET_S = 60.0
"""A bucket that takes longer than this, or than an answer may, is given up."""
LAST_WORD_S = 5.0
"""When the group breaks, the answer that says why comes within this time."""
GRACE_S = 2.0
"""The workers may be done, and say so, before this process has noticed that its own part is."""
NEEDS = "VLLM_SERVER_DEV_MODE=1, --worker-extension-cls pegbox_broadcast.Receiver, and its folder on PYTHONPATH"


class Broadcast:
    """Delivers by broadcast; the group is made anew for a server that was started again, and after an error."""

    def __init__(self, connection: Connection, device: torch.device, timeout_s: float) -> None:
        self._connection, self._device = connection, device
        self._timeout_s = min(timeout_s, BUCKET_S)
        self._group: Group | None = None
        self._met = self._size = 0
        self._dtype = torch.float32
        self._numbers = count()

    def __call__(self, name: str, cargo: Cargo) -> None:
        """Send it.

        Raises:
            RunError: the workers did not take it.
            ConfigError: the server was not started for it.
            ServerGone: the server is gone.
        """
        assert isinstance(cargo, Live), "what is broadcast is alive"
        if self._group is None or self._met != self._connection.met:
            self._join()
        group, size = self._group, self._size
        assert group is not None, "it was joined"
        # A name of its own for each try, for weights may be sent twice.
        update = f"{name}/{next(self._numbers)}"

        def work(stop: Stop) -> int:
            group.expected(update, size, stop)
            return send(group, cargo.weights.entries(self._dtype), stop)[0]

        tensors, answers = self._beside("pegbox_receive", {"update": update}, work, name)
        if answers != [{"update": update, "tensors": tensors}] * (size - 1):
            raise self._not_taken(name, f"was sent {tensors} tensors, and its workers say {str(answers)[:200]}")

    def close(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()
            with suppress(ServerGone, Refused):
                self._connection.client.post("/collective_rpc", {"method": "pegbox_leave"}, timeout_s=LAST_WORD_S)

    def _join(self) -> None:
        self._leave()
        connection = self._connection
        places = self._places()
        self._dtype = getattr(torch, places[0]["dtype"])
        gpus = [place["uuid"] for place in places] + [uuid(self._device)]
        # NCCL refuses two members on one GPU.
        apart = all(gpus) and len(set(gpus)) == len(gpus)
        backend = "nccl" if apart else "gloo"
        host = address_towards(urlsplit(connection.client.url).hostname or "localhost")
        limit = timedelta(seconds=self._timeout_s)
        store = dist.TCPStore(host, 0, None, is_master=True, timeout=limit, wait_for_workers=False)
        group = Group(store, host, backend, self._device, self._timeout_s)
        size = len(places) + 1
        told = {"host": host, "port": store.port, "size": size, "backend": backend, "timeout_s": self._timeout_s}
        self._beside("pegbox_join", told, lambda stop: group.join(0, size, stop), f"({backend} group)")
        self._group, self._size, self._met = group, size, connection.met

    def _places(self) -> list[dict[str, str]]:
        """What the workers compute on."""
        connection = self._connection
        try:
            answer = connection.told("/collective_rpc", {"method": "pegbox_place"}, "by broadcast", NEEDS)
            places = list(answer["results"])
        except RunError as error:
            if "pegbox_place" not in str(error):
                raise
            places = [None]
        if not all(isinstance(place, dict) for place in places):
            raise ConfigError(
                f"the workers of {connection.title} do not know how to take weights by broadcast",
                f"They say {str(places)[:200]}.",
                f"Start it with {NEEDS} (the README says which), or set rollout-vllm.transfer to disk.",
            )
        return places

    def _beside(
        self, method: str, told: dict[str, object], work: Callable[[Stop], Any], what: str
    ) -> tuple[Any, list[object]]:
        """Tell the workers to do their part while `work` does this one; its result, and their answers."""
        client = self._connection.client
        with ThreadPoolExecutor(1, "rollout-vllm") as pool:
            asked = pool.submit(client.post, "/collective_rpc", {"method": method, "kwargs": told})
            answered: list[float] = []
            asked.add_done_callback(lambda _: answered.append(time.monotonic()))

            def stop() -> None:
                if answered and (asked.exception() or time.monotonic() - answered[0] > GRACE_S):
                    raise Broken(f"the workers answered before their part was done: {_said(asked)}")

            try:
                result = work(stop)
                return result, list(asked.result()["results"])
            except BaseException as error:
                self._leave()
                if isinstance(error, Broken):
                    wait([asked], LAST_WORD_S)
                client.close()
                if isinstance(error, Broken | Refused):
                    raise self._reason(error, asked, what) from error
                raise

    def _reason(self, error: Broken | Refused, asked: Future[Any], what: str) -> Exception:
        """Why the group broke: a server that is gone, or the workers' own error."""
        said = asked.exception()
        if isinstance(said, ServerGone) or not self._connection.client.ready():
            return said if isinstance(said, ServerGone) else ServerGone(str(error))
        return self._not_taken(what, said.message if isinstance(said, Refused) else str(error))

    def _not_taken(self, what: str, said: str) -> RunError:
        return RunError(
            f"the vLLM server did not take the weights {what} by broadcast: {said}",
            "It keeps its old weights, or has some of the new ones.",
            "Look at the server's log, and at what stands between the run and the server; rollout-vllm.transfer: disk "
            "goes through a folder.",
        )

    def _leave(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()


def _said(asked: Future[Any]) -> str:
    return str(asked.exception() or asked.result())[:200]
