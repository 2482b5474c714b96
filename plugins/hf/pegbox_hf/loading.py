"""Loading a causal language model, with its own head or a classifying one, or its empty shape on the meta device.

Data types. `model.dtype` is that of weights that stay as they are. If the whole policy is trained (no plugin applies
adapters) it is loaded in `hf.trainable_dtype`, float32 unless the config says otherwise: updates of a bfloat16 weight
smaller than its last bit would be lost. With adapters the base keeps its type and the adapters have their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, UserError, did_you_mean
from pegbox.types import Model

from pegbox_hf.attention import DOCUMENTS, MASKLESS
from pegbox_hf.classifier import (
    CLASSIFIER,
    FAMILIES,
    OF_TOKENS,
    asked_config,
    auto_class,
    compute_values,
    finish_head,
    name_padding,
    require_classifier,
    require_trained_head,
    sparing_head,
)
from pegbox_hf.config import HfConfig
from pegbox_hf.forward import HEAD, compute
from pegbox_hf.head import LogitRule, TokenHead, find_rule
from pegbox_hf.opening import Opened, first_line, open_config
from pegbox_hf.processor import load_processor
from pegbox_hf.quiet import quiet
from pegbox_hf.source import require_safetensors, unsafe_weights
from pegbox_hf.text_only import load_text_part
from pegbox_hf.tokens import grow_embeddings, resize, set_special_ids, tokenizer_of
from pegbox_hf.traits import traits_of

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox.context import Context
    from pegbox.types import ModelRequest
    from transformers import PretrainedConfig, PreTrainedModel

ADAPTER_WEIGHTS = "adapter_model.safetensors"
SHOWN = 3


def load_model(ctx: Context, request: ModelRequest) -> Model:
    """Load one model for one role; with `request.meta` or `options.empty` only its shape, on the meta device.

    Raises:
        UserError: it is not there, is no causal language model, lacks weights, or an option is not supported.
    """
    if request.options.keep_packed is not None and request.options.quantization is None:
        raise UserError(
            f"parameters {', '.join(request.options.keep_packed)} are to stay packed, and no quantization says how",
            "This loader unpacks quantized weights or leaves them to the quantization that was asked for.",
            "Remove the plugin that asks for it, or load the model with one that can.",
        )
    with quiet(downloads=True):
        opened = open_config(ctx, request.name, request.revision, convert=not request.meta)
        _require_causal(opened, request)
        _require_quantizable(opened, request)
        dtype = wanted_dtype(ctx, request)
        shape_only = request.meta or bool(request.options.empty)
        module = _on_meta(ctx, opened, request, dtype) if shape_only else _from_weights(ctx, opened, request, dtype)
        _keep_layout(module)
        _require_trainable(ctx, request, module)
        _adjust_tokens(ctx, request, module)
        if request.options.classify is None:
            module.add_module(HEAD, TokenHead(LogitRule() if request.meta else find_rule(module)))
        elif request.role == "policy" and not request.meta:
            name_padding(module, ctx.processor if "processor" in vars(ctx) else load_processor(ctx))
    if request.role != "policy":
        module.requires_grad_(False)
    return Model(
        module=module,
        name=request.name,
        base=opened.base.address,
        format=request.format,
        compute=compute if request.options.classify is None else compute_values,
        role=request.role,
        traits=_traits(request, module),
    )


def _traits(request: ModelRequest, module: PreTrainedModel) -> frozenset[str]:
    found = traits_of(module.config, module)
    if request.options.classify is None:
        return found
    of_tokens = {OF_TOKENS} if request.options.classify == "token" else set()
    return found - {"tied_head"} | {CLASSIFIER} | of_tokens


def _keep_layout(module: PreTrainedModel) -> None:
    """Keep 4-bit layers of bitsandbytes in the layout that has a gradient and that PEFT can read.

    On CPUs with AVX512-BF16 the library packs weights anew at the first forward without gradients, such as an
    evaluation, for a product that has no backward. Nothing packs them back: training goes on without the gradients of
    all layers before a packed one. And DoRA reads the weights' lengths out of packed bytes as if they were not packed.
    """
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _adjust_tokens(ctx: Context, request: ModelRequest, module: PreTrainedModel) -> None:
    """Make room for new tokens, and have the configs name the special ones; second models of other names stay."""
    settings = ctx.section(HfConfig)
    if request.name != ctx.config.run.model.name or not (settings.new_tokens or settings.special_tokens):
        return
    tokenizer = tokenizer_of(ctx)
    if settings.new_tokens:
        grow_embeddings(ctx, module, tokenizer)
    set_special_ids(module, tokenizer, settings)


def wanted_dtype(ctx: Context, request: ModelRequest) -> str:
    """The name of the data type to load in; `auto` is the one that the checkpoint has.

    Without an accelerator `auto` is float32: it holds the same values, and a CPU computes in half precision at a third
    of the speed or less.
    """
    import torch

    trainable = ctx.section(HfConfig).trainable_dtype
    if request.role == "policy" and not ctx.owned(hooks.apply_adapters):
        return trainable
    if request.role == "policy" and trainable != HfConfig.model_fields["trainable_dtype"].default:
        raise ConfigError(
            f"hf.trainable_dtype is {trainable}, and a plugin applies an adapter",
            "It is the data type of a model that is trained whole; this one is frozen under the adapter.",
            "Remove hf.trainable_dtype; the base's own is model.dtype.",
        )
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
    own_code = f"AutoModelFor{FAMILIES[request.options.classify]}" in (getattr(opened.config, "auto_map", None) or {})
    if type(opened.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise UserError(
            f"'{request.name}' is no causal language model (model type '{opened.config.model_type}')",
            "This loader opens models that predict the next token.",
            "Set model.name to such a model."
            if opened.config.get_text_config() is opened.config
            else "To train its language model alone, add to the config: hf: {text_only: true}",
        )
    if request.options.classify is not None:
        require_classifier(opened, request)


def _require_trainable(ctx: Context, request: ModelRequest, module: PreTrainedModel) -> None:
    """Raise if weights that are no floats would be trained."""
    whole = request.role == "policy" and not ctx.owned(hooks.apply_adapters)
    packed = [name for name, weight in module.named_parameters() if not weight.is_floating_point()] if whole else []
    if packed:
        raise UserError(
            f"the weights of '{request.name}' are quantized ({packed[0]} and more), and no plugin applies adapters",
            "Quantized weights cannot be trained; an adapter on them can.",
            "Add lora to plugins.",
        )


def _require_quantizable(opened: Opened, request: ModelRequest) -> None:
    """Raise if weights are asked to be quantized twice, or quantized ones to come from another process.

    A request whose only effect is how stored quantized weights are loaded (transformers: loading attributes) may meet
    a checkpoint of its own kind. One that keeps parameters packed reads what is stored itself, and says what it cannot.
    """
    stored, asked = getattr(opened.config, "quantization_config", None), request.options.quantization
    if (stored or asked) and request.options.empty:
        raise UserError(
            f"'{request.name}' is quantized, and this process is to get its weights from another one",
            "Quantized weights come with scales that belong to no parameter.",
            "Have every process load the weights, or remove the plugin that quantizes.",
        )
    if stored is not None and asked is not None and request.options.keep_packed is None:
        method = getattr(stored, "quant_method", None) or dict(stored).get("quant_method")
        loading: dict[str, object] = getattr(asked, "get_loading_attributes", dict)()
        if not loading or getattr(asked, "quant_method", None) != method:
            raise UserError(
                f"the weights of '{request.name}' are quantized already ({method}), and a plugin asks to quantize them",
                "Weights are quantized once, from their full values.",
                "Remove the plugin that quantizes, or set model.name to the model that is not quantized.",
            )


def _architecture(request: ModelRequest) -> dict[str, object]:
    """Arguments that shape the network; None would be taken as a choice.

    Raises:
        UserError: transformers knows no such attention.
    """
    from transformers import AttentionInterface

    wanted = request.options.attention
    known = {"eager", *AttentionInterface().valid_keys()} - {MASKLESS, DOCUMENTS}
    known = {name for name in known if not name.startswith("paged|")}
    if wanted is not None and wanted not in known and "/" not in wanted:
        raise UserError(
            f"there is no attention '{wanted}'",
            did_you_mean(wanted, known, "transformers has:"),
            "Correct hf.attention, or add the plugin that brings it; a kernel of the hub is written owner/name.",
        )
    options = {
        "attn_implementation": request.options.attention,
        "experts_implementation": request.options.experts,
    }
    return {name: value for name, value in options.items() if value is not None}


def _on_meta(ctx: Context, opened: Opened, request: ModelRequest, dtype: str) -> PreTrainedModel:
    import torch

    stored = getattr(opened.config, "dtype", None) or torch.float32
    with _explained(request), torch.device("meta"):
        module: PreTrainedModel = auto_class(request.options).from_config(
            asked_config(opened.config, request.options),
            dtype=stored if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=opened.arguments["trust_remote_code"],
            **_architecture(request),
        )
    if request.options.classify is not None:
        finish_head(ctx, request, module, ())
    return module


def _from_weights(ctx: Context, opened: Opened, request: ModelRequest, dtype: str) -> PreTrainedModel:
    require_safetensors(opened.base)
    adapter = opened.source if opened.source.kind == "adapter" else None
    arguments = {"dtype": dtype, "use_safetensors": True, **opened.arguments, **_architecture(request)}
    with _explained(request):
        arguments |= _quantization(ctx, request)
        if request.options.classify is not None and request.options.quantization is not None:
            shape = _on_meta(ctx, opened, request, dtype)
            arguments["quantization_config"] = sparing_head(request.options.quantization, shape)
        if opened.whole is not None:
            module, missing = load_text_part(opened.base.address, opened.whole, opened.config, **arguments)
        else:
            asked = asked_config(opened.config, request.options)
            config = {"config": asked} if _changed(ctx, request) or asked is not opened.config else {}
            if request.options.keep_packed is not None:
                config = {"config": _without_quantization(asked)}
            module, report = auto_class(request.options).from_pretrained(
                opened.base.address, output_loading_info=True, **config, **arguments
            )
            missing = report["missing_keys"]
    lacking = finish_head(ctx, request, module, missing) if request.options.classify is not None else missing
    _require_complete(request, lacking)
    if adapter is not None and adapter.path is not None:
        module = _with_adapter(module, adapter.path, request)
    if request.options.classify is not None:
        require_trained_head(request, module, missing)
    return module


def _changed(ctx: Context, request: ModelRequest) -> bool:
    settings = ctx.section(HfConfig)
    return request.name == ctx.config.run.model.name and bool(settings.config_overrides or settings.rope_scaling)


def _without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """A config that says nothing of how weights are stored: who keeps them packed reads the stored form."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _quantization(ctx: Context, request: ModelRequest) -> dict[str, object]:
    """Arguments for weights that are quantized as they are loaded: where that is done is decided here."""
    if request.options.quantization is None:
        return {}
    device = getattr(vars(ctx).get("runtime"), "device", None)
    place = {} if device is None else {"device_map": {"": device}}
    return {"quantization_config": request.options.quantization, **place}


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
    config = peft.PeftConfig.from_pretrained(str(folder))
    rows = _rows_of_adapter(folder, config, module)
    if rows is not None:
        resize(module, rows)
    wrapped = peft.PeftModel(module, config)
    _require_complete(request, wrapped.load_adapter(str(folder), wrapped.active_adapter).missing_keys)
    return wrapped.get_base_model()


def _rows_of_adapter(folder: Path, config: object, module: PreTrainedModel) -> int | None:
    """How many embeddings the adapter was trained with: those it holds, or enough for the tokens it trains."""
    from safetensors import safe_open

    parts = (module.get_input_embeddings(), module.get_output_embeddings())
    ends = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if any(part is known for known in parts)}
    rows = int(module.get_input_embeddings().weight.shape[0])
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  it is no mapping
            if key.endswith(".weight") and key.split(".")[-2] in ends and "lora_" not in key:
                return int(weights.get_slice(key).get_shape()[0])
    trained = getattr(config, "trainable_token_indices", None) or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    return max([rows, *(int(index) + 1 for indices in lists for index in indices)])


def _require_complete(request: ModelRequest, missing_keys: Iterable[str]) -> None:
    missing = sorted(map(str, missing_keys))
    if missing:
        raise UserError(
            f"the weights of '{request.name}' lack {len(missing)} parameters: {', '.join(missing[:SHOWN])}",
            "They would be random numbers.",
            "Restore the missing file of the model, or name another one.",
        )
