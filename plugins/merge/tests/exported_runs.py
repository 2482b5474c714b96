"""Folders of runs whose adapters moved, as the plugins of a run export them; and damage to merged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.plan import compose
from pegbox.types import ExportRequest
from safetensors.torch import load_file, save_file


def trained(base: Path, folder: Path, plugins: tuple[str, ...] = (), **sections: Any) -> Path:
    """The folder of a run whose adapter was moved off its beginning, and exported as at the end of a run."""
    config = {"model": {"name": str(base)}, "plugins": ["hf", *plugins, "lora"], "output": str(folder)}
    ctx = compose({**config, **sections})
    ctx.runtime = SimpleNamespace(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    model = ctx.call(hooks.load_model, ctx, model_request(ctx))
    model = ctx.call(hooks.apply_adapters, ctx, model)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    folder.mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=folder, format="peft"))
    (folder / "run.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(ctx.config.resolved(), sort_keys=False))
    return folder


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "merged" / "merge.json").read_text())


def change(folder: Path, name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put another weight into a merged folder."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, name: value(weights[name]).contiguous()}, file, metadata={"format": "pt"})
