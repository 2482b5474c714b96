"""Writing the adapter in PEFT's layout, with tokenizer, template and generation config beside it.

The folder opens with `PeftModel.from_pretrained(base, folder)`, and in vLLM as a `--lora-modules` entry; plain low-rank
adapters also with `AutoModelForCausalLM.from_pretrained(folder)`, which finds the base by the path or name in
`adapter_config.json` (transformers' own loader misses the magnitudes of DoRA and modules that were saved whole).
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox_lora.adapter import ADAPTER

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import ExportRequest, Model

PREFIX = "base_model.model."
"""PEFT's names begin with it: they are those of a wrapped model."""
WEIGHTS = "adapter_model.safetensors"


def export(ctx: Context, model: Model, request: ExportRequest) -> Path:
    """Write the adapter's weights as they were trained, and all that is needed to use them; only rank 0 writes."""
    if ctx.runtime.rank == 0:
        _write(ctx, model, request.folder)
    return request.folder


def _write(ctx: Context, model: Model, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model.module, adapter_name=ADAPTER, save_embedding_layers=False)
    named = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(model.module.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(folder)
    generation = getattr(model.module, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)
    ctx.processor.tokenizer.save_pretrained(folder)
    for part in ctx.processor.parts.values():
        save = getattr(part, "save_pretrained", None)
        if save is not None:
            save(folder)
