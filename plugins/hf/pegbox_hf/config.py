"""The section `hf` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting

Float = Literal["float32", "bfloat16", "float16"]


class HfConfig(Section):
    """How models and tokenizers are loaded and written. Which model: `model.name`."""

    tokenizer: str | None = setting(None, "Folder or hub name of another tokenizer than the model's own.", min_length=1)
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
