"""Tiny models of several families, and the plugin's patches on them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.types import Model

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def network() -> Callable[[str], Model]:
    """`network("llama")`: a tiny model."""
    return make_network


def make_network(family: str) -> Model:
    pytest.importorskip("transformers")
    sys.path.insert(0, str(HERE))
    try:
        from tiny_networks import network_of
    finally:
        sys.path.remove(str(HERE))
    return Model(
        module=network_of(family),
        name=family,
        base=family,
        format="transformers",
        compute=lambda *_: None,  # type: ignore[arg-type,return-value]
    )


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    """`context(rope=True)`: a run with the plugin and this section; `plugins` are others before it."""
    return partial(make_context, tmp_path)


def make_context(folder: Path, plugins: tuple[str, ...] = (), **section: Any) -> Context:
    config = {"model": {"name": "x"}, "plugins": [*plugins, "liger"], "liger": section, "output": str(folder / "run")}
    return compose(config)


@pytest.fixture
def answer() -> Callable[..., str]:
    """`answer("library_choices.py", "llama", interpret=True)`: what a program beside this file prints."""

    def run(program: str, *arguments: str, interpret: bool = False) -> str:
        import os

        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({"TRITON_INTERPRET": "1"} if interpret else {})}
        command = [sys.executable, str(HERE / program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run
