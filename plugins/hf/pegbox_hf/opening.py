"""Opening what `model.name` says with transformers, and saying clearly why it does not open.

Remote code runs only if `hf.trust_remote_code` lists the very name; no weights are downloaded before the config of
the model was read and found to be usable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_hf import gguf_file
from pegbox_hf.config import HfConfig
from pegbox_hf.conversion import converted, place
from pegbox_hf.hub import reachable
from pegbox_hf.overrides import override
from pegbox_hf.source import Source, base_of_adapter, locate
from pegbox_hf.text_only import text_part

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox.context import Context
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Opened:
    """A located model with its config read.

    Attributes:
        source: what `from_pretrained` opens; of an adapter, the adapter's folder.
        base: what `from_pretrained` opens to get the base model.
        config: the config of the base model, with what the run changes; of `hf.text_only`, its text part.
        whole: the config of the model that the text part is taken from, if it is.
        arguments: what every `from_pretrained` of this model takes: revision, trust, whether to ask the hub.
    """

    source: Source
    base: Source
    config: PretrainedConfig
    arguments: dict[str, object]
    whole: PretrainedConfig | None = None


def find(ctx: Context, name: str, revision: str | None) -> Source:
    """Where the model `name` lies; GGUF files as they are."""
    return locate(name, ctx.config.path, revision)


def open_config(ctx: Context, name: str, revision: str | None, *, convert: bool = True) -> Opened:
    """Locate a model and read its config.

    Args:
        ctx: the run.
        name: as the config has it.
        revision: of a hub repository.
        convert: convert a GGUF file if it has not been; otherwise only its header is read.

    Raises:
        UserError: it is not there, cannot be reached, needs code that the config does not trust, or has no such field
            or part as the config asks for.
    """
    settings = ctx.section(HfConfig)
    source = find(ctx, name, revision)
    base = source
    if source.kind == "adapter" and source.path is not None:
        base = find(ctx, base_of_adapter(source.path), None)
    trusted = name in settings.trust_remote_code or base.name in settings.trust_remote_code
    if base.kind == "gguf" and base.path is not None:
        cache = ctx.config.path(settings.cache)
        if not convert and not place(base.path, cache).exists():
            header = override(ctx, name, _header_config(base.path))
            return Opened(source, base, header, {"trust_remote_code": trusted})
        folder = replace(base, kind="folder", path=converted(base.path, cache))
        source, base = (folder if source is base else source), folder
    arguments: dict[str, object] = {"trust_remote_code": trusted}
    if base.kind == "hub":
        arguments |= {"revision": base.revision or "main", "local_files_only": not reachable(base)}
    config = _read_config(base, arguments)
    whole = config if settings.text_only and name == ctx.config.run.model.name else None
    config = override(ctx, name, config if whole is None else text_part(name, whole))
    return Opened(source, base, config, arguments, whole)


def _header_config(path: Path) -> PretrainedConfig:
    from pegbox_hf.gguf_weights import read_config

    return read_config(gguf_file.read(path))


def _read_config(source: Source, arguments: dict[str, object]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    try:
        written, _ = PretrainedConfig.get_config_dict(source.address, **arguments)
    except OSError as error:
        raise UserError(
            f"the config of '{source.name}' cannot be read: {first_line(error)}",
            "A model's folder holds a config.json that is valid JSON.",
            "Correct model.name, or restore the file.",
        ) from error
    kind = written.get("model_type")
    if kind not in CONFIG_MAPPING and "auto_map" in written and not arguments["trust_remote_code"]:
        raise UserError(
            f"'{source.name}' runs its own Python code (model type '{kind}')",
            "Code that comes with a model can do anything; it runs only for models that the config names.",
            f"If you have read it and trust it, add to the config: hf: {{trust_remote_code: [{source.name}]}}",
        )
    try:
        return AutoConfig.from_pretrained(source.address, **arguments)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"transformers does not know the model type '{kind}' of '{source.name}'",
            first_line(error),
            "Type: pip install --upgrade transformers",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error of a library."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
