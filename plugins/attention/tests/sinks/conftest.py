"""A tiny gpt-oss loaded by the plugin `hf`, with and without this plugin; batches that are padded and packed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.types import ModelRequest

sys.path.insert(0, str(Path(__file__).parents[1]))

from document_batches import Run

WINDOW = 4
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,  # all of them: no rounding sends a token elsewhere
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
    "initial_context_length": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with random weights, sinks and biases among them."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt_oss", **SHAPE))
    with torch.no_grad():  # zero biases and equal sinks would hide what is not used
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("models") / "gpt-oss"
    model.save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """`load({"backend": "pegbox"})` patches the model; `load(None)` leaves it eager."""

    def make(
        section: Mapping[str, Any] | None,
        *more: str,
        meta: bool = False,
        device: str = "cpu",
        precision: Any = "fp32",
        **sections: Any,
    ) -> Run:
        plugins = ["hf", *(["gpt-oss-attention"] if section is not None else []), *more]
        own = {"gpt-oss-attention": dict(section)} if section else {}
        config = {
            "model": {"name": str(folder)},
            "plugins": plugins,
            "output": str(tmp_path / "run"),
            **own,
            **sections,
        }
        ctx, log = compose(config), PatchLog()
        if not meta:
            ctx.runtime = FakeRuntime()
            vars(ctx.runtime).update(device=torch.device(device), precision=precision)
        request: ModelRequest = model_request(ctx, meta=meta)
        model = ctx.call(hooks.load_model, ctx, request)
        model.module.to("meta" if meta else device).train()
        log.apply(model, ctx.each(hooks.patch_attention, ctx, model))
        if "lora" in plugins:
            model = ctx.call(hooks.apply_adapters, ctx, model)
        for stage in ("adapted", "recompute"):
            log.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
        return Run(ctx, replace(model, role="policy"), log)

    return make
