"""What a model is, in words that other plugins can ask for: from its config and the names of its parameters.

A trait is stated by the fields that give a model its behaviour, so a new model type needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PretrainedConfig


def _value(config: PretrainedConfig, *names: str) -> object:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _more_than_one(config: PretrainedConfig, *names: str) -> bool:
    value = _value(config, *names)
    return isinstance(value, int) and value > 1


def _layers(config: PretrainedConfig) -> Sequence[str]:
    kinds = _value(config, "layer_types", "layers_block_type")
    return kinds if isinstance(kinds, list | tuple) else ()


def _sliding(config: PretrainedConfig) -> bool:
    if _layers(config):
        return "sliding_attention" in _layers(config)
    return _value(config, "sliding_window") is not None and _value(config, "use_sliding_window") is not False


FROM_CONFIG: dict[str, Callable[[PretrainedConfig], bool]] = {
    "causal": lambda config: _value(config, "use_bidirectional_attention") in (None, False),
    "moe": lambda config: _more_than_one(
        config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"
    ),
    "tied_head": lambda config: bool(_value(config, "tie_word_embeddings")),
    "sliding_window": _sliding,
    "chunked_attention": lambda config: "chunked_attention" in _layers(config),
    "linear_attention": lambda config: bool({"linear_attention", "mamba", "recurrent"} & set(_layers(config))),
    "latent_attention": lambda config: _value(config, "kv_lora_rank") is not None,
    "attention_softcap": lambda config: _value(config, "attn_logit_softcapping") is not None,
    "logit_softcap": lambda config: _value(config, "final_logit_softcapping", "logits_soft_cap") is not None,
    "quantized": lambda config: _value(config, "quantization_config") is not None,
}
FROM_PARAMETERS = {
    "attention_sinks": "self_attn.sinks",
    "qk_norm": "self_attn.q_norm.weight",
    "head_bias": "lm_head.bias",
}


def traits_of(config: PretrainedConfig, module: Module) -> frozenset[str]:
    """The traits of a model: `config` is that of its text part; `module` may be on the meta device."""
    from pegbox_hf.documents import mixing_layers

    names = [name for name, _ in module.named_parameters()]
    carried = {"recurrent"} if mixing_layers(module) else set()
    seen = {trait for trait, suffix in FROM_PARAMETERS.items() if any(name.endswith(suffix) for name in names)}
    return traits_of_config(config) | seen | carried


def traits_of_config(config: PretrainedConfig) -> frozenset[str]:
    """The traits that the config of a model's text part states."""
    text = config.get_text_config()
    return frozenset(trait for trait, holds in FROM_CONFIG.items() if holds(text))
