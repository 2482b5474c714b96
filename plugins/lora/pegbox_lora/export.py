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
from pegbox_lora.initialization import STATE, FirstFactors, lora_layers

if TYPE_CHECKING:
    import peft
    from pegbox.context import Context
    from pegbox.types import ExportRequest, Model
    from torch import Tensor

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
    config = copy.copy(model.module.peft_config[ADAPTER])
    first = ctx.states.get(STATE)
    if isinstance(first, FirstFactors):
        scales = {name: part.scaling[ADAPTER] for name, part in lora_layers(model.module)}
        weights = _for_the_published_base(weights, config, first, scales)
    # A tied head shares the memory of the embeddings; a safetensors file holds each tensor by itself.
    named = {PREFIX + name: tensor.detach().cpu().clone().contiguous() for name, tensor in weights.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
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


def _for_the_published_base(
    weights: dict[str, Tensor], config: peft.LoraConfig, first: FirstFactors, scales: dict[str, float]
) -> dict[str, Tensor]:
    """The adapter of a changed base as one of twice the rank for the base as it was published; changes `config`.

    The scale of each layer goes into its second matrix, so that alpha equals the rank everywhere.
    """
    import torch

    config.r, config.lora_alpha, config.use_rslora = 2 * config.r, 2 * config.r, False
    config.rank_pattern = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
    config.alpha_pattern = dict(config.rank_pattern)
    converted = dict(weights)
    for name, tensor in weights.items():
        layer, _, kind = name.rpartition(".lora_")
        if kind == "A.weight":
            converted[name] = torch.cat([tensor, first[layer][0].to(tensor)], dim=0)
        elif kind == "B.weight":
            converted[name] = scales[layer] * torch.cat([tensor, -first[layer][1].to(tensor)], dim=1)
    return converted
