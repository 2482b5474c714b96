"""The language model alone, out of a model that also sees or hears.

transformers opens the whole checkpoint, with all its renaming of weights; its decoder and head are then put into the
causal language model that its text config describes. The weights are exactly those, no name is guessed, and what is
exported is a plain language model. The price: the other parts are read once, and dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

QUANTIZER_FIELDS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method")


def text_part(name: str, whole: PretrainedConfig) -> PretrainedConfig:
    """The config of the text part of a model.

    Raises:
        ConfigError: it has no other parts, or transformers has no language model for the text part alone.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    text = whole.get_text_config()
    if text is whole:
        raise ConfigError(
            f"hf.text_only is set, but '{name}' (model type '{whole.model_type}') has no parts other than text",
            "There is nothing to leave out.",
            "Remove hf.text_only.",
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(
            f"hf.text_only: transformers has no language model of type '{text.model_type}' apart from '{name}'",
            "Its text part only runs inside the whole model, so an export could not be opened.",
            "Remove hf.text_only, or use a model of text.",
        )
    return text


def load_text_part(
    address: str, whole: PretrainedConfig, text: PretrainedConfig, **arguments: object
) -> tuple[PreTrainedModel, list[str]]:
    """Load the whole model and keep its language model.

    Args:
        address: what `from_pretrained` opens.
        whole: config of the whole model.
        text: config of its text part.
        arguments: for `from_pretrained`.

    Returns:
        The language model, and names of its weights that the checkpoint lacks.

    Raises:
        UserError: the text part is not laid out as a language model of its own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    loaded, report = _class_of(whole).from_pretrained(address, config=whole, output_loading_info=True, **arguments)
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(text, attn_implementation=text._attn_implementation)
    decoder, head = loaded.get_decoder(), loaded.get_output_embeddings()
    if type(decoder) is not type(alone.get_decoder()) or head is None:
        raise UserError(
            f"hf.text_only: the text part of {type(loaded).__name__} is a {type(decoder).__name__}, and "
            f"{type(alone).__name__} holds a {type(alone.get_decoder()).__name__}",
            "They are not the same network, so weights would have to be guessed.",
            "Remove hf.text_only.",
        )
    missing = _missing(loaded, decoder, head, report["missing_keys"])
    places = (alone.get_decoder(), decoder), (alone.get_output_embeddings(), head)
    for name, module in list(alone.named_children()):
        setattr(alone, name, next((new for old, new in places if old is module), module))
    alone.config = decoder.config
    alone.config.tie_word_embeddings = head.weight is loaded.get_input_embeddings().weight
    alone.generation_config = loaded.generation_config
    for field in QUANTIZER_FIELDS:
        if hasattr(loaded, field):
            setattr(alone, field, getattr(loaded, field))
    quantization = getattr(loaded.config, "quantization_config", None)
    if quantization is not None:
        alone.config.quantization_config = quantization
    return alone.train(loaded.training), missing


def _class_of(whole: PretrainedConfig) -> type[PreTrainedModel]:
    import transformers

    for kind in ("ImageTextToText", "MultimodalLM", "Seq2SeqLM"):
        auto = getattr(transformers, f"AutoModelFor{kind}", None)
        if auto is not None and type(whole) in auto._model_mapping:
            return auto  # type: ignore[no-any-return]
    raise UserError(
        f"hf.text_only: no class of transformers opens model type '{whole.model_type}' as a whole",
        "The text part is taken out of the whole model.",
        "Remove hf.text_only, or use a model of text.",
    )


def _missing(loaded: PreTrainedModel, decoder: object, head: object, missing: set[str]) -> list[str]:
    """Of the weights that the checkpoint lacks, those of the decoder and the head."""
    kept = tuple(f"{name}." for name, module in loaded.named_modules() if module is decoder or module is head)
    return sorted(name for name in missing if name.startswith(kept))
