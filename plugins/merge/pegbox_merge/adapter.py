"""The adapter in the shape of its base: PEFT's own layers on the meta device, and one real weight at a time in them.

The base is built without weights, PEFT puts its layers into it, and only the adapter's parameters are real. To merge
one weight, it is placed into its layer, PEFT's `merge` is called, and the result is taken out. So the arithmetic of
every kind of adapter is PEFT's own; it runs in float32 and is rounded once, to the data type of the output.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import peft
import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import TrainableTokensWrapper
from pegbox.errors import UserError
from torch import Tensor, nn

if TYPE_CHECKING:
    from pegbox_merge.runs import Trained

ADAPTER = "default"
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
"""Initializations that also change the base's weights: such an adapter belongs to a base that is nowhere stored."""


@dataclass
class Adapter:
    """What an adapter does to each weight of its base; names are those of the base in memory.

    Attributes:
        module: the base without weights, as transformers builds it, with PEFT's layers inside.
        shapes: the shape of each weight of the bare base.
        replaced: weights that were trained in full, or that the adapter's file brings with it.
        layers: the layer that merges each other weight that changes.
        tied: weights that are the same as another one: `{lm_head.weight: model.embed_tokens.weight}`.
        quantized: weights that training saw quantized.
        quantization: how: a `BitsAndBytesConfig`.
    """

    module: nn.Module
    shapes: dict[str, torch.Size]
    conversions: list[Any]
    tied: dict[str, str]
    config: dict[str, Any]
    replaced: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, tuple[BaseTunerLayer, str]] = field(default_factory=dict)
    quantized: frozenset[str] = frozenset()
    quantization: Any = None

    @property
    def changed(self) -> set[str]:
        """Weights that the merged model does not share with the stored base."""
        return {*self.replaced, *self.layers, *self.quantized}

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """The weight of the merged model; `weight` is the base's, and may be overwritten.

        Raises:
            UserError: the result is not finite: the adapter or the base is broken.
        """
        if name in self.replaced:
            weight = self.replaced[name].clone()
        elif weight.shape != self.shapes[name]:
            weight = self._grown(name, weight)
        if name in self.quantized and name not in self.replaced:
            from pegbox_merge.requantized import as_trained

            weight = as_trained(weight, self.quantization)
        result = self._add(name, weight) if name in self.layers else weight
        if not torch.isfinite(result).all():
            raise UserError(
                f"the merged weight {name} is not finite",
                "The adapter or the base holds values that are no numbers.",
                "Merge an earlier checkpoint of the run.",
            )
        return result

    def tied_after(self, target: str, source: str, read: Callable[[str], Tensor]) -> bool:
        """Whether two weights that are one in the base are still one after merging."""
        if not {target, source} & self.changed:
            return True
        if not {target, source} <= self.changed:
            return False
        return bool(torch.equal(self.merged(target, read(source)), self.merged(source, read(source))))

    def _grown(self, name: str, weight: Tensor) -> Tensor:
        """The weight with rows for the tokens that the run added; rows of the adapter's tokens are written later.

        Raises:
            UserError: a row is neither stored nor in the adapter.
        """
        layer, wanted = self.layers.get(name, (None, ""))[0], self.shapes[name]
        tokens = set(layer.token_indices[ADAPTER]) if isinstance(layer, TrainableTokensLayer) else set()
        lost = set(range(weight.shape[0], max(tokens, default=wanted[0] - 1) + 1)) - tokens
        if weight.shape[1:] != wanted[1:] or weight.shape[0] > wanted[0] or lost:
            raise lacks_rows(name, weight.shape, wanted)
        # Beyond the last token: rows that only fill up a multiple, and begin as the mean of the others.
        rows = weight.float().mean(0, keepdim=True).expand(wanted[0] - weight.shape[0], *wanted[1:])
        return torch.cat([weight, rows.to(weight.dtype)])

    def _add(self, name: str, weight: Tensor) -> Tensor:
        layer, attribute = self.layers[name]
        if isinstance(layer, ParamWrapper) and layer.num_experts > 1:
            return _add_to_experts(layer, weight)
        base = layer.get_base_layer()
        empty = dict(base._parameters)
        base._parameters[attribute] = nn.Parameter(weight.float(), requires_grad=False)
        merged_before = list(layer.merged_adapters)
        try:
            layer.merge()
            return base._parameters[attribute].data
        finally:
            base._parameters.update(empty)
            layer.merged_adapters[:] = merged_before


def _add_to_experts(layer: ParamWrapper, weight: Tensor) -> Tensor:
    """One expert after the other, so that no second stack of experts is ever in memory. `weight` is overwritten."""
    factors: Any = layer.get_delta_factors
    lhs, rhs, scaling = factors(ADAPTER)
    weight = weight.clone() if not weight.is_contiguous() else weight
    for expert in range(layer.num_experts):
        delta = lhs[expert].float() @ rhs[expert].float()
        weight[expert] = weight[expert].float().add_(delta, alpha=scaling).to(weight.dtype)
    return weight


def lacks_rows(name: str, stored: torch.Size | tuple[int, ...], wanted: torch.Size) -> UserError:
    """The error for a weight that grew in training, by rows that are nowhere written."""
    return UserError(
        f"the base's weight {name} is stored with the shape {list(stored)}, the run had {list(wanted)}",
        "Tokens were added in training, and their rows are not in the adapter.",
        "Train them (trainable tokens, or the embeddings in full), so that the adapter holds them.",
    )


def open_adapter(trained: Trained) -> Adapter:
    """Build the base without weights, and put the adapter into it.

    Raises:
        UserError: the adapter is of a kind that cannot be merged, or does not fit the base.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    config = _mergeable(trained)
    module = trained.load_base(replace(trained.head, dtype="float32"), meta=True).module
    module.requires_grad_(False)
    names = {(id(part), key): name for name, part, key in _parameters(module)}
    adapter = Adapter(
        module=module,
        shapes={name: tensor.shape for name, tensor in module.state_dict().items()},
        conversions=get_model_conversion_mapping(cast("Any", module)),
        tied=dict(getattr(module, "all_tied_weights_keys", None) or {}),
        config=config.to_dict(),
    )
    if trained.requantize:
        from pegbox_merge.requantized import quantized_weights

        adapter.quantization = trained.options.quantization
        adapter.quantized = quantized_weights(copy.deepcopy(module), adapter.quantization)
    wrapped = _with_layers(trained, config, module)
    adapter.replaced = _replaced(wrapped, names)
    for name, layer, key in _layers(wrapped, names):
        if name in adapter.layers:
            raise _unsupported(trained, f"{name} is changed by two parts of the adapter")
        adapter.layers[name] = (layer, key)
    if not adapter.layers and not adapter.replaced:
        raise _unsupported(trained, "it changes no weight of its base")
    return adapter


def _mergeable(trained: Trained) -> peft.PeftConfig:
    config: peft.PeftConfig = peft.PeftConfig.from_pretrained(str(trained.folder))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise _unsupported(trained, f"its kind is {kind}, and LoRA with its variants is what can be merged")
    init = str(getattr(config, "init_lora_weights", ""))
    if init.startswith(CHANGES_THE_BASE):
        raise UserError(
            f"the adapter in {trained.folder} began with '{init}', which changes the base's weights as well",
            "The base on disk is not the one that the adapter belongs to.",
            "Export it as a plain adapter first (PEFT: save_pretrained with path_initial_model_for_weight_conversion).",
        )
    if getattr(config, "lora_bias", False):
        raise _unsupported(trained, "its low-rank matrices have biases (lora_bias)")
    config.inference_mode = True
    if isinstance(config, peft.LoraConfig):
        config.init_lora_weights = True
        config.lora_dropout = 0.0
    return config


def _with_layers(trained: Trained, config: peft.PeftConfig, module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = peft.PeftModel(
                cast("Any", module), config, ADAPTER, autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
            for part in wrapped.modules():
                if isinstance(part, BaseTunerLayer):
                    # PEFT would move what it loaded to the device of the base: to meta, where it is lost.
                    part.__dict__["_move_adapter_to_device_of_base_layer"] = _stay
            weights = load_peft_weights(str(trained.folder), device="cpu")
            report: Any = set_peft_model_state_dict(wrapped, weights, ADAPTER, low_cpu_mem_usage=True)
        except (ValueError, RuntimeError, TypeError, NotImplementedError, KeyError, OSError) as error:
            raise _unsupported(trained, f"PEFT does not fit it into its base: {str(error).splitlines()[0]}") from error
    if report.unexpected_keys:
        raise _unsupported(trained, f"its weight {report.unexpected_keys[0]} belongs to no part of the base")
    lacking = [name for name, tensor in wrapped.named_parameters() if tensor.is_meta and _own(name)]
    if lacking:
        raise _unsupported(trained, f"its file lacks {len(lacking)} weights, such as {lacking[0]}")
    return wrapped.float()


def _stay(*_: object, **__: object) -> None:
    """In place of moving."""


def _own(name: str) -> bool:
    """Whether a parameter belongs to the adapter."""
    return any(mark in name for mark in (".lora_", f".modules_to_save.{ADAPTER}", ".trainable_tokens_delta"))


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter with its owner; one that is tied is named at each place."""
    for name, part in module.named_modules():
        for key in part._parameters:
            yield (f"{name}.{key}" if name else key), part, key


def _replaced(wrapped: nn.Module, names: Mapping[tuple[int, str], str]) -> dict[str, Tensor]:
    """Weights that were trained in full: copies that the adapter keeps, and base parameters that its file brought."""
    found: dict[str, Tensor] = {}
    for part in wrapped.modules():
        for key, parameter in part._parameters.items():
            name = names.get((id(part), key))
            if name is not None and parameter is not None and not parameter.is_meta:
                found[name] = parameter.data
    for wrapper in wrapped.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and ADAPTER in wrapper.modules_to_save:
            originals = dict(wrapper.original_module.named_modules())
            for inner, part in wrapper.modules_to_save[ADAPTER].named_modules():
                for key, parameter in part._parameters.items():
                    if parameter is not None:
                        found[names[id(originals[inner]), key]] = parameter.data
    return found


def _layers(wrapped: nn.Module, names: Mapping[tuple[int, str], str]) -> Iterator[tuple[str, BaseTunerLayer, str]]:
    for layer in wrapped.modules():
        if isinstance(layer, ParamWrapper):
            key = layer.parameter_name
            yield names[id(layer.get_base_layer()), key], layer, key
        elif isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            if ADAPTER not in layer.lora_A and ADAPTER not in layer.lora_embedding_A:
                continue
            yield names[id(base), "weight"], layer, "weight"
        elif isinstance(layer, TrainableTokensWrapper):
            yield names[id(layer.token_adapter.base_layer), "weight"], layer.token_adapter, "weight"


def _unsupported(trained: Trained, why: str) -> UserError:
    return UserError(
        f"the adapter in {trained.folder} cannot be merged into {trained.base}",
        f"{why[0].upper()}{why[1:]}.",
        "Check that --base is the model it was trained on; or serve the adapter beside its base.",
    )
