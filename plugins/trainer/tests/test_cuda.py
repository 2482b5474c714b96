"""On a GPU: the loop waits for the device only to log, half precision trains, and a resumed run is exact."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.hooks import hookimpl
from tiny_runs import assert_same_run, records, run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class NoWaiting:
    """Lets torch raise at any synchronization between step 2 and step 9, but for those of the model's own forward.

    Transformers looks at its attention mask on the host in each forward; that is not for the loop to change.
    """

    mode = "default"

    @hookimpl(wrapper=True)
    def load_model(self) -> Any:
        model = yield

        def compute(*arguments: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            outputs = model.compute(*arguments)
            torch.cuda.set_sync_debug_mode(self.mode)
            return outputs

        return replace(model, compute=compute)

    @hookimpl
    def on_event(self, event: Any) -> None:
        if type(event).__name__ == "Stepped" and event.step in (2, 9):
            self.mode = "error" if event.step == 2 else "default"
            torch.cuda.set_sync_debug_mode(self.mode)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_host_never_waits_for_the_device_between_logged_steps(config: Any, tmp_path: Path, precision: str) -> None:
    rows = {"shortest": 16, "longest": 16}
    keys = {"max_steps": 10, "log_every": 10, "accumulation": 2, "precision": precision, "plugins": ["waiting"]}
    try:
        run(config(tiny=rows, **keys), waiting=NoWaiting())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [10]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_close_to_full(config: Any, tmp_path: Path, precision: str) -> None:
    keys = {"max_steps": 8, "tiny": {"rows": 4}, "adamw": {"learning_rate": 3e-3}}
    for name in ("fp32", precision):
        run(config(output=name, precision=name, **keys))
    full, half = (records(tmp_path / name, "train") for name in ("fp32", precision))
    assert full[-1]["loss"] < full[0]["loss"] - 0.3
    assert half[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=3e-2)
    assert half[-1]["loss"] != full[-1]["loss"]


def test_auto_is_bf16_where_the_gpu_has_it(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bf16 arithmetic")
    run(config(max_steps=1, progress="lines"))
    assert capsys.readouterr().out.startswith("tiny on cuda:0 in bf16")


def test_a_resumed_run_is_exact(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 8, "log_every": 3, "save_every": 4, "keep": None, "deterministic": True}
    keys |= {"tiny": {"dropout": 0.2}, "precision": "fp16"}
    run(config(output="whole", **keys))
    run(config(output="parted", **keys))
    run(config(output="parted", resume="step-00000004", **keys))
    for folder in (tmp_path / "whole", tmp_path / "parted"):
        text = (folder / "metrics.jsonl").read_text()
        assert "peak_memory_bytes" in text
    assert_same_run(tmp_path / "parted", tmp_path / "whole", 8)
