"""Writing a trained model so that `from_pretrained` and servers open the folder as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError

from pegbox_hf.config import HfConfig
from pegbox_hf.forward import bare
from pegbox_hf.quiet import quiet
from pegbox_hf.source import CONFIG

if TYPE_CHECKING:
    import torch
    from pegbox.context import Context
    from pegbox.types import ExportRequest, Model
    from torch import Tensor


def export_model(ctx: Context, model: Model, request: ExportRequest) -> Path:
    """Write weights (safetensors), config, generation config, tokenizer and chat template; only rank 0 writes."""
    if ctx.runtime.rank == 0:
        with quiet():
            _write(ctx, model, request.folder)
    return request.folder


def require_whole(ctx: Context, model: Model) -> None:
    """Refuse a data type of the export where an adapter alone is exported, by the plugin that applied it.

    Raises:
        ConfigError: naming the setting.
    """
    wanted = ctx.section(HfConfig).export_dtype
    if model.adapter is not None and wanted != "trained":
        raise ConfigError(
            f"hf.export_dtype is {wanted}, but this run exports an adapter, not the whole model",
            "The setting would do nothing.",
            "Remove it; `pegbox merge` has --dtype for the merged model.",
        )


def _write(ctx: Context, model: Model, folder: Path) -> None:
    import torch

    network, wanted = bare(model.module), ctx.section(HfConfig).export_dtype
    if wanted == "trained":
        network.save_pretrained(folder)
    else:
        network.save_pretrained(folder, state_dict=_converted(network.state_dict(), getattr(torch, wanted)))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps({**config, "dtype": wanted}, indent=2) + "\n", encoding="utf-8")
    ctx.processor.tokenizer.save_pretrained(folder)
    for part in ctx.processor.parts.values():
        save = getattr(part, "save_pretrained", None)
        if save is not None:
            save(folder)


def _converted(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights in another data type; tied ones stay tied, so that they are written once."""
    made: dict[tuple[int, torch.Size], Tensor] = {}
    return {
        name: made.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(dtype))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in weights.items()
    }
