"""Full weights to a real vLLM by broadcast: no file is written, and no server that misses an update passes."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from meddling import Proxy
from pegbox.errors import ConfigError, RunError
from pegbox_rollout_vllm.worker import pegbox_broadcast
from rollout_runs import OWN, StartedRun, processes, server_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
Start = Callable[..., StartedRun]
CLOSE = 1e-4
WAY = {"transfer": "broadcast", "request_timeout_s": 20.0}


def require_ours(run: StartedRun) -> None:
    """vLLM answers as transformers does with the weights that are trained."""
    network = run.model.module.eval()
    for rollout in run.generate(temperature=0.0):
        ids = torch.tensor([rollout.prompt])
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert rollout.completion == tuple(out[0, len(rollout.prompt) :].tolist())
        logps = run.logits(rollout).log_softmax(-1).gather(-1, torch.tensor(rollout.completion)[:, None])[:, 0]
        assert (logps - torch.tensor(rollout.logps)).abs().max() < CLOSE


def test_weights_arrive_without_a_file_are_read_back_and_the_base_is_put_back(started: Start, served: str) -> None:
    run = started(lora=False, url=served, **WAY)
    for version in range(3):
        receipt = run.sync(version)
        assert receipt.version == version
        assert "7 of 15 parameters of the workers read back with our checksums" in receipt.evidence
        assert ("a canary was seen" in receipt.evidence) is (version == 0)
        require_ours(run)
        run.learn(version, size=0.1)
    assert not list(run.ctx.folder.rglob("*.safetensors"))
    run.close()
    # Adapters are only taken by a server that holds the base model.
    assert started(url=served).sync(0).version == 0


def test_a_server_that_swallows_broadcasts_is_found_at_the_first_and_at_a_later_sync(
    started: Start, proxy: Proxy
) -> None:
    proxy.swallows_methods = frozenset({"pegbox_receive"})
    with pytest.raises(RunError, match=r"the weights pegbox-\w+-canary by broadcast: the workers answered"):
        started(lora=False, url=proxy.url, **WAY).sync(0)
    proxy.swallows_methods = frozenset()
    run = started(lora=False, url=proxy.url, **WAY)
    run.sync(0)
    proxy.swallows_methods = frozenset({"pegbox_receive"})
    run.learn(0, size=1e-6)
    with pytest.raises(RunError, match=r"(?s)did not take the weights pegbox-\w+-v1 by broadcast.*old weights"):
        run.sync(1)


def test_workers_that_cannot_receive_are_an_error_before_anything_is_sent(started: Start, proxy: Proxy) -> None:
    proxy.swallows_methods = frozenset({"pegbox_place"})
    with pytest.raises(ConfigError, match=r"(?s)do not know how to take weights.*--worker-extension-cls pegbox_broad"):
        started(lora=False, url=proxy.url, **WAY).sync(0)


def test_a_server_of_our_own_that_is_killed_is_sent_its_weights_once_more(
    started: Start, base: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    run = started(lora=False, model=copied, **OWN, **WAY)
    run.sync(0)
    run.learn(0, size=0.1)
    run.sync(1)
    os.kill(server_of(copied), signal.SIGKILL)
    require_ours(run)


def test_a_server_of_our_own_that_is_killed_in_the_middle_of_an_update_is_started_again_and_gets_it(
    started: Start, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    run = started(lora=False, model=copied, **OWN, **WAY)
    run.sync(0)
    real, killed = pegbox_broadcast._send_bucket, []

    def kill_once(group, entries, stop):
        real(group, entries, stop)
        if not killed:
            killed.append(server_of(copied))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(pegbox_broadcast, "_send_bucket", kill_once)
    monkeypatch.setattr(pegbox_broadcast, "BUCKET_BYTES", 2**12)
    run.learn(0, size=0.1)
    assert run.sync(1).version == 1
    assert killed != [server_of(copied)]
    require_ours(run)


def test_a_worker_that_is_killed_in_the_middle_of_an_update_is_an_error_and_no_hang(
    started: Start, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = shutil.copytree(base, tmp_path / "base")
    run = started(lora=False, model=copied, **OWN, **WAY, restarts=0)
    run.sync(0)
    real = pegbox_broadcast._send_bucket
    worker = [pid for pid in _below(server_of(copied)) if pid != server_of(copied)]

    def kill(group, entries, stop):
        real(group, entries, stop)
        for pid in worker:
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(pegbox_broadcast, "_send_bucket", kill)
    monkeypatch.setattr(pegbox_broadcast, "BUCKET_BYTES", 2**12)
    begun = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)ended .*restarts allows no further start. Its last lines:"):
        run.sync(1)
    assert time.monotonic() - begun < 60
    run.close()
    assert not processes(str(copied))


def _below(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in _below(int(child)))]


def test_a_model_with_an_adapter_is_refused(started: Start, served: str) -> None:
    with pytest.raises(ConfigError, match=r"transfer is broadcast, and the model has an adapter"):
        started(url=served, **WAY)
