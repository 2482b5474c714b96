"""Loading a causal language model: from safetensors, or its empty shape on the meta device.

Data types. `model.dtype` is that of weights that stay as they are. If the whole policy is trained (no plugin applies
adapters) it is loaded in `hf.trainable_dtype`, float32 unless the config says otherwise: updates of a bfloat16 weight
smaller than its last bit would be lost. With adapters the base keeps its type and the adapters have their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
    from pathlib import Path

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
    with quiet(downloads=True):
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
    """The name of the data type to load in; `auto` is the one that the checkpoint has.

    Without an accelerator `auto` is float32: it holds the same values, and a CPU computes in half precision at a third
    of the speed or less.
    """
    import torch

    if request.role == "policy" and not ctx.owned(hooks.apply_adapters):
        return ctx.section(HfConfig).trainable_dtype
    wanted = request.options.dtype or ctx.config.run.model.dtype
    as_stored = torch.accelerator.is_available() or request.options.quantization is not None
    return wanted if wanted != "auto" or as_stored else "float32"


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
    with _explained(request), torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            opened.config,
            dtype=stored if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=opened.arguments["trust_remote_code"],
            **_architecture(request),
        )


def _from_weights(opened: Opened, request: ModelRequest, dtype: str) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    require_safetensors(opened.base)
    adapter = opened.source if opened.source.kind == "adapter" else None
    quantization = {} if request.options.quantization is None else {"quantization_config": request.options.quantization}
    with _explained(request):
        module, report = AutoModelForCausalLM.from_pretrained(
            opened.base.address,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            **opened.arguments,
            **_architecture(request),
            **quantization,
        )
    _require_complete(request, report["missing_keys"])
    return _with_adapter(module, adapter.path, request) if adapter is not None and adapter.path is not None else module


@contextmanager
def _explained(request: ModelRequest) -> Iterator[None]:
    """What transformers raises, as an error that says what to do."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        if isinstance(error, OSError) and "safetensors" in str(error):
            raise unsafe_weights(request.name, "has no safetensors weights") from error
        raise UserError(
            f"'{request.name}' does not load: {first_line(error)}",
            "transformers says so.",
            "Correct the key it speaks of, or the model's files.",
        ) from error


def _with_adapter(module: PreTrainedModel, folder: Path, request: ModelRequest) -> PreTrainedModel:
    """The model with a PEFT adapter in its layers; transformers' own loader would miss parts of some adapters."""
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"'{request.name}' is a PEFT adapter", "PEFT is not installed.", "Type: pip install 'pegbox-hf[adapters]'"
        ) from error
    wrapped = peft.PeftModel(module, peft.PeftConfig.from_pretrained(str(folder)))
    _require_complete(request, wrapped.load_adapter(str(folder), wrapped.active_adapter).missing_keys)
    return wrapped.get_base_model()


def _require_complete(request: ModelRequest, missing_keys: Iterable[str]) -> None:
    missing = sorted(map(str, missing_keys))
    if missing:
        raise UserError(
            f"the weights of '{request.name}' lack {len(missing)} parameters: {', '.join(missing[:SHOWN])}",
            "They would be random numbers.",
            "Restore the missing file of the model, or name another one.",
        )
