"""What a model's folder holds beside its weights: config, generation config, tokenizer, template, code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)
NOT_THE_MODELS = ("dtype", "torch_dtype", "transformers_version", "architectures", "quantization_config", "use_cache")
"""Settings of a loaded config that say how it was loaded."""
OTHERS = (("generation_config.json",), ("*processor_config.json",))


def copy_side_files(run: Path, base: Path, target: Path) -> None:
    """The run's files, and the base's where the run has none; a tokenizer comes from one of them, whole."""
    for patterns in (TOKENIZER, *OTHERS):
        found = _matching(run, patterns)
        complete = any(file.name in ("tokenizer_config.json", "tokenizer.json") for file in found)
        if not found or (patterns is TOKENIZER and not complete):
            found = _matching(base, patterns)
        for file in found:
            _copy(file, target)
    for file in _matching(base, ("*.py",)):
        _copy(file, target)


def tokenizer_of(folder: Path, otherwise: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or that of another one where it has none."""
    from transformers import AutoTokenizer

    has = any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder if has else otherwise))
    return made


def name_classifier(base: dict[str, Any], module: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the config name the class that opens a classifying model, and the token that pads its rows.

    transformers' sequence classifiers score the rightmost token that is not `pad_token_id`.

    Args:
        base: the base's config; changed.
        module: the model as it was trained; its config is changed.
    """
    base["architectures"] = [type(module).__name__]
    if tokenizer.pad_token_id is not None:
        for part in (module.config, module.config.get_text_config()):
            part.pad_token_id = tokenizer.pad_token_id


def write_config(base: Mapping[str, Any], target: Path, *, dtype: str, untied: bool, module: Any) -> None:
    """The base's config with what the run and merging changed.

    That is: settings that the run overrode, the size of the vocabulary, the data type, ties, and no quantization.
    """
    made = {key: value for key, value in base.items() if key not in ("quantization_config", "compression_config")}
    alone = made.get("model_type") == module.config.model_type
    part = made if alone else made.get("text_config", {})
    before = type(module.config).from_dict(part).to_dict()
    part.update(_changes(before, module.config.to_dict()))
    for part in (made, made.get("text_config")):
        if isinstance(part, dict):
            if part is made or "dtype" in part or "torch_dtype" in part:
                part["torch_dtype" if "torch_dtype" in part and "dtype" not in part else "dtype"] = dtype
            if untied and (part is made or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the run loaded its base with, and that are not the base's own."""
    return {
        key: value
        for key, value in after.items()
        if key not in NOT_THE_MODELS and not key.startswith("_") and before.get(key) != value
    }


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target / source.name)
    else:
        shutil.copyfile(source, target / source.name)
