"""The tokenizer of the run's model, with the template and tokens that the config names.

Padding needs an id. In this order: the tokenizer's own pad token (`hf.special_tokens` may set it); a token that was
reserved for such use and is not an end token; the end token. The last is safe because rows are padded on the right
and known by their length, never by an id: the end token of a document stays trained. A choice of ours is logged and
leaves the tokenizer as it is, so that what a run exports is what it loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from typing import TYPE_CHECKING, cast

from pegbox.errors import UserError
from pegbox.types import Processor

from pegbox_hf import gguf_file
from pegbox_hf.config import HfConfig
from pegbox_hf.opening import Opened, find, first_line, open_config
from pegbox_hf.quick import QuickTokenizer, quick_tokenizer
from pegbox_hf.quiet import quiet
from pegbox_hf.source import looks_like_path
from pegbox_hf.template import set_template
from pegbox_hf.tokens import add_tokens

if TYPE_CHECKING:
    from pegbox.context import Context
    from transformers import PreTrainedTokenizerBase

FOR_PADDING = (
    re.compile(r"[<\[]\W*(\w+_)?pad(ding)?(_\w+)?\W*[>\]]", re.IGNORECASE),
    re.compile(r"<\W*(unused|reserved)\w*\W*>", re.IGNORECASE),
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_processor(ctx: Context) -> Processor:
    """Load the tokenizer of `model.name`, or the one that `hf.tokenizer` names, and change it as the config says.

    Raises:
        UserError: there is none, it does not open, it knows more tokens than the model has embeddings for, or a
            template or token of the config does not exist.
    """
    settings = ctx.section(HfConfig)
    if ctx.purpose == "rows":  # no model will be loaded
        quickly = quick_tokenizer(ctx, settings, partial(_whole, ctx))
        if quickly is not None:
            return _processor(ctx, cast("PreTrainedTokenizerBase", quickly))
    return _processor(ctx, _whole(ctx))


def _whole(ctx: Context) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers opens, changed as the config says."""
    wanted, settings = ctx.config.run.model, ctx.section(HfConfig)
    with quiet():
        opened = open_config(ctx, wanted.name, wanted.revision)
        tokenizer = _named_tokenizer(ctx, settings.tokenizer) if settings.tokenizer else _own_tokenizer(ctx, opened)
    if opened.source.kind != "adapter":  # its new tokens have embeddings in the adapter
        _require_embeddings(tokenizer, opened)
    add_tokens(tokenizer, settings)
    if settings.chat_template is not None:
        set_template(ctx, tokenizer, settings.chat_template)
    return tokenizer


def _processor(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> Processor:
    padding = pad_id(tokenizer)
    if tokenizer.pad_token_id is None:
        ends = " (also the end token; rows are known by length)" if padding == tokenizer.eos_token_id else ""
        ctx.log.info("no pad token; rows are padded with %r%s", tokenizer.convert_ids_to_tokens(padding), ends)
    return Processor(tokenizer=tokenizer, pad_id=padding, fingerprint=fingerprint(tokenizer))


def _named_tokenizer(ctx: Context, name: str) -> PreTrainedTokenizerBase:
    folder = ctx.config.path(name)
    if not folder.is_dir() and looks_like_path(name):
        raise UserError(f"hf.tokenizer is '{name}', but {folder} is no folder", "", "Correct hf.tokenizer.")
    return _open(str(folder) if folder.is_dir() else name, {}, "hf.tokenizer")


def _own_tokenizer(ctx: Context, opened: Opened) -> PreTrainedTokenizerBase:
    for source in (opened.source, opened.base):
        if source.path is None or any((source.path / name).exists() for name in TOKENIZER_FILES):
            return _open(source.address, opened.arguments, "model.name")
    original = find(ctx, opened.base.name, None)
    if original.kind == "gguf" and original.path is not None:
        from pegbox_hf.gguf_tokenizer import build

        return build(gguf_file.read(original.path))
    raise UserError(
        f"{opened.source.address} holds no tokenizer",
        f"None of {', '.join(TOKENIZER_FILES)} is there.",
        "Copy the model's tokenizer files into it, or set hf.tokenizer to a folder or hub name that has them.",
    )


def _open(address: str, arguments: dict[str, object], key: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(address, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        missing = re.search(r"pip install [\w-]+", str(error))
        raise UserError(
            f"the tokenizer of '{address}' ({key}) does not open: {first_line(error)}",
            "transformers says so.",
            f"Type: {missing.group()}" if missing else f"Correct {key}, or set hf.tokenizer to one that opens.",
        ) from error


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, opened: Opened) -> None:
    rows = getattr(opened.config.get_text_config(), "vocab_size", None)
    known = tokenizer.get_vocab()
    largest = max(known, key=known.__getitem__)
    if rows is not None and known[largest] >= rows:
        raise UserError(
            f"the tokenizer has the token {largest!r} with id {known[largest]}, but the model has {rows} embeddings",
            "Tokenizer and model do not belong together, or tokens were added without new embeddings.",
            "Set hf.tokenizer to the tokenizer of this model.",
        )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills rows of a batch.

    Raises:
        UserError: the tokenizer has no pad, reserved or end token.
    """
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    special = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for pattern in FOR_PADDING:
        for token, token_id in special.items():
            if pattern.fullmatch(token) and token_id != tokenizer.eos_token_id:
                return int(token_id)
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    raise UserError(
        f"the tokenizer {tokenizer.name_or_path} has no pad token, no reserved token and no end token",
        "Rows of a batch are filled with one of them, and completions end with the last.",
        "Set eos_token in its tokenizer_config.json, or hf.tokenizer to another tokenizer.",
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies everything that changes token ids: vocabulary, merges, added tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    else:
        model = backend.to_str()
        model = model[model.index('"added_tokens"') :]  # before it: how the last call padded and truncated
    added = {token_id: repr(token) for token_id, token in sorted(tokenizer.added_tokens_decoder.items())}
    name = tokenizer.class_name if isinstance(tokenizer, QuickTokenizer) else type(tokenizer).__name__
    parts = (name, model, added, tokenizer.special_tokens_map, tokenizer.chat_template)
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
