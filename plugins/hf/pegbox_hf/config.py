"""The section `hf` of a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pegbox.section import Section, setting
from pydantic import JsonValue, model_validator

Float = Literal["float32", "bfloat16", "float16"]
SpecialRole = Literal["bos_token", "eos_token", "pad_token", "unk_token"]


class NewToken(Section):
    """A token that the tokenizer does not have yet."""

    text: str = setting(..., "The token, as it stands in a text.", min_length=1)
    special: bool = setting(False, "A control token: never split, and left out of decoded answers.")
    like: str | None = setting(
        None, "Text whose tokens give the first embedding by their mean, e.g. a description of the token.", min_length=1
    )


class HfConfig(Section):
    """How models and tokenizers are loaded and written. Which model: `model.name`."""

    tokenizer: str | None = setting(None, "Folder or hub name of another tokenizer than the model's own.", min_length=1)
    chat_template: str | None = setting(
        None,
        "Name of a template that an active plugin declares, or a `.jinja` file (a relative path starts at the config's "
        "folder); the tokenizer's own if not set. It is exported with the tokenizer.",
        min_length=1,
    )
    special_tokens: Mapping[SpecialRole, str] = setting(
        {},
        "Tokens that take a part: `bos_token`, `eos_token`, `pad_token`, `unk_token`; each is one the tokenizer has.",
    )
    new_tokens: tuple[str | NewToken, ...] = setting((), "Tokens to add, each a text or its settings.")
    new_embeddings: Literal["mean", "sampled"] = setting(
        "mean",
        "First embedding of a new token without `like`: the mean of all old ones, or a draw from a normal distribution "
        "of their mean and covariance.",
    )
    embedding_multiple: int = setting(
        1, "The embeddings' rows are filled up to a multiple of this where tokens are added.", unit="tokens", ge=1
    )
    config_overrides: Mapping[str, JsonValue] = setting(
        {}, "Fields of the model's own config that differ; inner fields of a mapping are changed one by one."
    )
    rope_scaling: Mapping[str, JsonValue] | None = setting(
        None, "How rotary positions are scaled, in transformers' words, e.g. `{rope_type: yarn, factor: 4.0}`."
    )
    attention: str | None = setting(
        None,
        "Attention by its name in transformers: `eager`, `sdpa`, `flex_attention`, `flash_attention_2`, or "
        "`owner/kernel` of the hub; transformers chooses if not set.",
        min_length=1,
    )
    text_only: bool = setting(False, "Load the language model alone out of a model that also sees or hears.")
    trainable_dtype: Float = setting(
        "float32", "Data type in which the policy is loaded when all of it is trained (no adapter is applied)."
    )
    export_dtype: Literal["trained"] | Float = setting(
        "trained", "Data type of the exported weights; `trained` writes them as they were trained, exactly."
    )
    trust_remote_code: tuple[str, ...] = setting(
        (), "Names of models whose own Python code may be run, each as `model.name` has it."
    )
    cache: str = setting(
        "~/.cache/pegbox/models",
        "Folder that keeps converted GGUF files; a relative path starts at the config's folder.",
    )

    @model_validator(mode="after")
    def _tokens_are_added(self) -> HfConfig:
        idle = [name for name in ("new_embeddings", "embedding_multiple") if getattr(self, name) != _default(name)]
        if idle and not self.new_tokens:
            raise ValueError(f"{idle[0]} is set, but new_tokens adds none: it would do nothing; remove it")
        return self


def _default(name: str) -> object:
    return HfConfig.model_fields[name].default
