"""What RUN means: an adapter that was exported, the base that it belongs to, and how that base was loaded.

A run's own config says how: its plugins are composed again, so that the base is loaded by the same owners and with the
same options (quantization above all) as in training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pegbox import hooks
from pegbox.errors import UserError
from pegbox.folder import RECORD
from pegbox.merging import merge_options
from pegbox.plan import compose
from pegbox.types import Model, ModelOptions, ModelRequest, Role

if TYPE_CHECKING:
    from pegbox.context import Context

CONFIG, ADAPTER = "config.yaml", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
CLASSIFIES: Mapping[str, Literal["sequence", "token"]] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}
"""What an adapter's base does, in PEFT's words, where it does not predict the next token."""
OF_ANY_MODEL = ("text_only", "trust_remote_code")
"""Settings of hf that say how a model is opened, whichever it is."""
SIDE_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py", "*.tiktoken")


@dataclass(frozen=True)
class Trained:
    """An adapter, and the base that it is merged into.

    Attributes:
        folder: the adapter's.
        base: what loads the base: a folder or a hub name.
        base_files: the folder with the base's weights and config.
        options: what the run asked of its base when it was loaded.
        onto: which weights the adapter is added to, in words.
        quantized: training computed with a quantized base.
        requantize: the base was quantized while it was loaded for training, and these weights are merged into.
    """

    ctx: Context
    folder: Path
    base: str
    revision: str | None
    base_files: Path
    options: ModelOptions
    onto: str
    quantized: bool
    requantize: bool

    def load_base(self, options: ModelOptions, *, meta: bool = False) -> Model:
        """Load the base as the run did, but for `options`; a classifying one with a head that the adapter replaces."""
        form = self.ctx.config.run.model.format
        # Of a second model the head must be trained already; that of the policy begins as it did in training.
        role: Role = "policy" if self.options.classify is not None and not meta else "reference"
        request = ModelRequest(
            name=self.base, format=form, revision=self.revision, role=role, meta=meta, options=options
        )
        return self.ctx.call(hooks.load_model, self.ctx, request)

    @property
    def head(self) -> ModelOptions:
        """Options that ask for nothing but the head that was trained: for tokens, or one that classifies."""
        return ModelOptions(classify=self.options.classify, labels=self.options.labels)

    def load_merged(self, folder: Path) -> Model:
        """Load a merged folder. What the run changed in its base (tokens, settings) is in the folder already."""
        settings = self.ctx.config.resolved().get("hf") or {}
        kept = {key: settings[key] for key in OF_ANY_MODEL if settings.get(key)}
        if "trust_remote_code" in kept:
            kept["trust_remote_code"] = [str(folder)]
        ctx = compose({"model": {"name": str(folder)}, "plugins": ["hf"], "hf": kept})
        request = ModelRequest(
            name=str(folder), format=ctx.config.run.model.format, role="reference", options=self.head
        )
        return ctx.call(hooks.load_model, ctx, request)


def open_run(folder: Path, base: str | None = None, onto: Literal["trained", "published"] = "trained") -> Trained:
    """Understand a run's folder or an adapter's; reads no weights.

    Raises:
        UserError: there is no adapter, it is of a kind that cannot be merged, or its base is not there.
    """
    folder = folder.expanduser().resolve()
    _require_adapter(folder)
    adapter = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    name = _base_name(folder, adapter, base)
    revision = None if base or Path(name).exists() else adapter.get("revision")
    ctx = compose(_config(folder, name))
    options = merge_options(ctx.each(hooks.configure_model, ctx))
    if options.classify is None and adapter.get("task_type") in CLASSIFIES:
        labels = _labels(folder, adapter)
        options = replace(options, classify=CLASSIFIES[adapter["task_type"]], labels=labels)
    files = _base_folder(name, revision)
    stored = _quantization(files)
    quantized_here = options.quantization is not None and stored is None
    requantize = quantized_here and onto == "trained"
    if onto == "published" and not quantized_here:
        raise UserError(
            "--onto published, but the base was not quantized while it was loaded for training",
            "The published weights and those that the adapter was trained on are the same.",
            "Leave --onto out.",
        )
    if quantized_here and onto == "published":
        options = replace(options, quantization=None)
    words = "the base's weights"
    if stored is not None:
        words = f"the dequantized weights of the base ({stored})"
    elif requantize:
        words = "the base's weights as they were trained on: quantized, and dequantized again"
    elif quantized_here:
        words = "the base's published weights (training saw them quantized)"
    quantized = stored is not None or options.quantization is not None
    return Trained(ctx, folder, name, revision, files, options, words, quantized, requantize)


def _require_adapter(folder: Path) -> None:
    if (folder / ADAPTER).is_file():
        return
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}", "A run's folder was expected.", "Correct the name of the run.")
    if (folder / "config.json").is_file():
        raise UserError(
            f"there is nothing to merge in {folder}",
            "It holds a whole model, not an adapter: all of the model was trained.",
            f"Use the folder as it is: pegbox chat {folder}",
        )
    if (folder / RECORD).is_file():
        raise UserError(
            f"the run {folder} has no adapter yet",
            "A run exports it when training ends; this one is still training, was interrupted, or failed.",
            f"Go on with it: pegbox run {folder / CONFIG} resume=auto",
        )
    raise UserError(
        f"{folder} holds neither a run nor an adapter",
        f"There is no {ADAPTER} in it.",
        "Name a run's folder, or the folder of a PEFT adapter.",
    )


def _labels(folder: Path, adapter: Mapping[str, Any]) -> int:
    """How many numbers a classifying adapter's head predicts: the rows of its weight.

    Raises:
        UserError: the adapter's file holds no head.
    """
    from safetensors import safe_open

    if (folder / ADAPTER_WEIGHTS).is_file():
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
            for name in adapter.get("modules_to_save") or ():
                if (weight := f"base_model.model.{name}.weight") in stored:
                    return int(file.get_slice(weight).get_shape()[0])
    raise UserError(
        f"the adapter in {folder} classifies ({adapter['task_type']}), and {ADAPTER_WEIGHTS} holds no head",
        "A head that is not in the adapter is nowhere: its first weights were random numbers.",
        "Train it with the head among its modules_to_save.",
    )


def _base_name(folder: Path, adapter: Mapping[str, Any], given: str | None) -> str:
    name = given or adapter.get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{folder / ADAPTER} does not name the base model",
            "base_model_name_or_path is empty.",
            "Name it: --base FOLDER_OR_HUB_NAME",
        )
    path = Path(name).expanduser()
    if path.exists():
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")):
        raise UserError(
            f"the base model {name} is not there",
            f"{'--base' if given else ADAPTER} says that the adapter belongs to it.",
            "Say where it is now: --base FOLDER_OR_HUB_NAME",
        )
    return str(name)


def _config(folder: Path, base: str) -> dict[str, Any]:
    """The run's config with the base as model; for an adapter alone, the least that loads a model."""
    file = folder / CONFIG
    if not file.is_file():
        return {"model": {"name": base}, "plugins": ["hf"]}
    config: dict[str, Any] = {"extends": str(file), "model": {"name": base, "revision": None}}
    trusted = (yaml.safe_load(file.read_text(encoding="utf-8")).get("hf") or {}).get("trust_remote_code")
    if trusted:
        config["hf"] = {"trust_remote_code": [*trusted, base]}
    return config


def _base_folder(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*WEIGHTS, *SIDE_FILES]))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"the base model {name} cannot be fetched: {str(error).splitlines()[0]}",
            "Its weights are merged with the adapter.",
            "Log in to the hub if it is private, or say where it is: --base FOLDER",
        ) from error


def _quantization(files: Path) -> str | None:
    """How the stored weights of the base are quantized, None if they are not.

    Raises:
        UserError: in a way that cannot be undone here.
    """
    file = files / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = found.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in found else "unknown")
    if method == "bitsandbytes":
        return "bitsandbytes int8" if found.get("load_in_8bit") else f"bitsandbytes {found.get('bnb_4bit_quant_type')}"
    raise UserError(
        f"the base model {files} is stored quantized by '{method}'",
        "Only weights of bitsandbytes can be dequantized here.",
        "Merge into the unquantized model of the same name: --base FOLDER_OR_HUB_NAME",
    )
