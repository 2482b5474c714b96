"""Loading a causal language model: from safetensors, or its empty shape on the meta device.

Data types. `model.dtype` is that of weights that stay as they are. If the whole policy is trained (no plugin applies
adapters) it is loaded in `hf.trainable_dtype`, float32 unless the config says otherwise: updates of a bfloat16 weight
smaller than its last bit would be lost. With adapters the base keeps its type and the adapters have their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import UserError
from pegbox.types import Model

from pegbox_hf.config import HfConfig
from pegbox_hf.forward import HEAD, compute
from pegbox_hf.head import LogitRule, TokenHead, find_rule
from pegbox_hf.opening import Opened, first_line, open_config
from pegbox_hf.quiet import quiet
from pegbox_hf.source import require_safetensors, unsafe_weights
from pegbox_hf.traits import traits_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import ModelRequest
    from transformers import PreTrainedModel

SHOWN = 3


def load_model(ctx: Context, request: ModelRequest) -> Model:
    """Load one model for one role; with `request.meta` only its shape, on the meta device.

    Raises:
        UserError: it is not there, is no causal language model, lacks weights, or an option is not supported.
    """
    if request.options.keep_packed is not None:
        raise UserError(
            f"parameters {', '.join(request.options.keep_packed)} are to stay packed",
            "This loader unpacks quantized weights or leaves them to the quantization that was asked for.",
            "Remove the plugin that asks for it, or load the model with one that can.",
        )
    with quiet():
        opened = open_config(ctx, request.name, request.revision, convert=not request.meta)
        _require_causal(opened, request)
        dtype = wanted_dtype(ctx, request)
        module = _on_meta(opened, request, dtype) if request.meta else _from_weights(opened, request, dtype)
        rule = LogitRule() if request.meta else find_rule(module)
    module.add_module(HEAD, TokenHead(rule))
    if request.role != "policy":
        module.requires_grad_(False)
    return Model(
        module=module,
        name=request.name,
        base=opened.base.address,
        format=request.format,
        compute=compute,
        role=request.role,
        traits=traits_of(opened.config, module),
    )


def wanted_dtype(ctx: Context, request: ModelRequest) -> str:
    """The name of the data type to load in; `auto` is the one that the checkpoint has."""
    if request.role == "policy" and not ctx.owned(hooks.apply_adapters):
        return ctx.section(HfConfig).trainable_dtype
    return request.options.dtype or ctx.config.run.model.dtype


def _require_causal(opened: Opened, request: ModelRequest) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if opened.source.kind == "adapter" and request.role == "policy":
        raise UserError(
            f"'{request.name}' is a PEFT adapter, not a model",
            f"It was trained on {opened.base.name}; training goes on from a whole model.",
            "Set model.name to the base model, or resume the run that made the adapter.",
        )
    own_code = "AutoModelForCausalLM" in (getattr(opened.config, "auto_map", None) or {})
    if type(opened.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise UserError(
            f"'{request.name}' is no causal language model (model type '{opened.config.model_type}')",
            "This loader opens models that predict the next token.",
            "Set model.name to such a model.",
        )


def _architecture(request: ModelRequest) -> dict[str, object]:
    """Arguments that shape the network; None would be taken as a choice."""
    options = {
        "attn_implementation": request.options.attention,
        "experts_implementation": request.options.experts,
    }
    return {name: value for name, value in options.items() if value is not None}


def _on_meta(opened: Opened, request: ModelRequest, dtype: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    stored = getattr(opened.config, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            opened.config,
            dtype=stored if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=opened.trusted,
            **_architecture(request),
        )


def _from_weights(opened: Opened, request: ModelRequest, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    require_safetensors(opened.base)
    quantization = {} if request.options.quantization is None else {"quantization_config": request.options.quantization}
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            opened.source.address,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **opened.arguments,
            **_architecture(request),
            **quantization,
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if "safetensors" in str(error) and opened.source.kind == "hub":
            raise unsafe_weights(opened.source.address, "has no safetensors weights") from error
        raise UserError(
            f"'{request.name}' does not load: {first_line(error)}", "transformers says so.", "Correct the key it speaks of."
        ) from error
    _require_complete(request, report)
    return module


def _require_complete(request: ModelRequest, report: dict[str, object]) -> None:
    missing = sorted(map(str, report["missing_keys"]))  # type: ignore[call-overload]
    if missing:
        raise UserError(
            f"the weights of '{request.name}' lack {len(missing)} parameters: {', '.join(missing[:SHOWN])}",
            "They would be random numbers.",
            "Restore the missing file of the model, or name another one.",
        )
