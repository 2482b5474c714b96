"""A GGUF file as a folder that `from_pretrained` opens: made once, kept in a cache.

The folder's name holds a digest of the file's content, of transformers' version and of this converter's, so a
changed file or a changed program gives another folder and an old one is never wrong. It is built beside its final
place and renamed; a lock lets one process build while the others wait. Reading a file of some GB for its digest
takes seconds, so the digest is remembered by path, size and time of the last change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_hf import gguf_file
from pegbox_hf.gguf_file import GgufFile
from pegbox_hf.quiet import quiet

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig

CONVERTER_VERSION = 1
"""Raised when the same file would give another folder."""

logger = logging.getLogger("pegbox.hf")


def converted(path: Path, cache: Path) -> Path:
    """The folder made from a GGUF file; converts it if no process did before.

    Raises:
        UserError: the file cannot be converted exactly.
    """
    from filelock import FileLock

    folder = place(path, cache)
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{folder.name}.lock"):
        if not folder.exists():
            logger.info("converting %s (once; kept in %s)", path.name, folder)
            unfinished = cache / f".{folder.name}.new"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            with quiet():
                _convert(path, unfinished)
            unfinished.rename(folder)
    return folder


def place(path: Path, cache: Path) -> Path:
    """Where the folder of a GGUF file is, or would be."""
    from transformers import __version__

    key = f"{_digest(path, cache)}/{__version__}/{CONVERTER_VERSION}"
    return cache / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _digest(path: Path, cache: Path) -> str:
    state = path.stat()
    seen = f"{path.resolve()}/{state.st_size}/{state.st_mtime_ns}"
    memo = cache / "digests" / hashlib.sha256(seen.encode()).hexdigest()
    if memo.exists():
        return memo.read_text(encoding="ascii")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    memo.parent.mkdir(parents=True, exist_ok=True)
    unfinished = memo.with_name(f"{memo.name}.{os.getpid()}")
    unfinished.write_text(digest, encoding="ascii")
    unfinished.replace(memo)
    return digest


def _convert(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from pegbox_hf.gguf_tokenizer import build
    from pegbox_hf.gguf_weights import read_config, read_weights

    header = gguf_file.read(path)
    config = read_config(header)
    weights = read_weights(header, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    model.generation_config = _generation_config(header, config)
    model.save_pretrained(folder)
    try:
        build(header).save_pretrained(folder)
    except UserError:
        logger.info("%s: the tokenizer cannot be rebuilt; the folder has none", path.name)
    origin = {"file": path.name, "name": header.get("general.name"), "license": header.get("general.license")}
    (folder / "pegbox.json").write_text(json.dumps({"converted_from": origin}, indent=1), encoding="utf-8")


def _generation_config(header: GgufFile, config: PretrainedConfig) -> GenerationConfig:
    from transformers import GenerationConfig

    turn_end = header.get("tokenizer.ggml.eot_token_id")
    ends = dict.fromkeys(token for token in (config.eos_token_id, turn_end) if isinstance(token, int))
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=list(ends) or None, pad_token_id=config.pad_token_id
    )
