"""A tokenizer read straight from its files, for commands that make rows and load no model.

transformers takes seconds to import, most of them for PyTorch. Where a folder's files say that transformers would take
`tokenizer.json` as it stands (its class `TokenizersBackend`), the library `tokenizers` reads that file alone, and the
special tokens and the template are what `tokenizer_config.json` and `chat_template.jinja` say. Everything else about
such a tokenizer is asked of the one that transformers opens, on first use. Whatever is not certain (another class,
tokens to add, settings this module does not know) is not opened here: `quick_tokenizer` answers None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox_hf.config import HfConfig
from pegbox_hf.source import CONFIG, locate

if TYPE_CHECKING:
    from pegbox.context import Context
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerBase

CLASS = "TokenizersBackend"
CLASSES = (CLASS, "PreTrainedTokenizerFast")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order of transformers."""
MODEL_TYPES = frozenset(
    {
        *("llama", "smollm3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "granite", "granitemoe"),
        *("olmo2", "olmo3", "phi", "qwen3", "qwen3_moe", "stablelm"),
    }
)
"""Models whose tokenizers transformers opens with the class that `tokenizer_config.json` names, if that is `CLASS`."""
MEANINGLESS = frozenset(
    {
        *("backend", "clean_up_tokenization_spaces", "is_local", "legacy", "local_files_only", "model_input_names"),
        *("model_max_length", "model_type", "padding_side", "tokenizer_class", "add_bos_token", "add_eos_token"),
        *(f"{role}_id" for role in ROLES),
    }
)
"""Keys of `tokenizer_config.json` that change neither ids, nor special tokens, nor the template, beside a
`tokenizer.json`."""
MISTRAL_SIZE = 100_000
"""Above this size transformers looks whether a split of Mistral's must be corrected."""


class QuickTokenizer:
    """What rows need of a tokenizer; all else is asked of transformers' own, which `open_whole` opens.

    Attributes:
        class_name: of transformers' tokenizer.
        backend_tokenizer, chat_template, name_or_path, special_tokens_map: as there.
    """

    class_name = CLASS

    def __init__(
        self,
        backend: Tokenizer,
        special: Mapping[str, str],
        template: str | None,
        address: str,
        open_whole: Callable[[], PreTrainedTokenizerBase],
    ) -> None:
        self.backend_tokenizer, self.chat_template, self.name_or_path = backend, template, address
        self.special_tokens_map = dict(special)
        self._open_whole = open_whole
        self._whole: PreTrainedTokenizerBase | None = None
        for role in ROLES[:5]:
            token = special.get(role)
            setattr(self, role, token)
            setattr(self, f"{role}_id", None if token is None else backend.token_to_id(token))

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Added tokens by id."""
        return self.backend_tokenizer.get_added_tokens_decoder()

    def get_vocab(self) -> dict[str, int]:
        """Ids by token, added ones among them."""
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def convert_ids_to_tokens(self, ids: int | list[int], **options: Any) -> Any:
        """The token of one id; of several, those that transformers says."""
        if isinstance(ids, int):
            return self.backend_tokenizer.id_to_token(ids)
        return self.whole().convert_ids_to_tokens(ids, **options)

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def __call__(self, *texts: Any, **options: Any) -> Any:
        return self.whole()(*texts, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked by copy and pickle before there is anything
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def whole(self) -> PreTrainedTokenizerBase:
        """The tokenizer that transformers opens."""
        if self._whole is None:
            self._whole = self._open_whole()
        return self._whole


def quick_tokenizer(
    ctx: Context, settings: HfConfig, open_whole: Callable[[], PreTrainedTokenizerBase]
) -> QuickTokenizer | None:
    """The tokenizer of the run's model, or None if transformers must open it: then nothing was decided."""
    changed = (settings.tokenizer, settings.chat_template, settings.special_tokens, settings.new_tokens)
    if any(changed) or settings.text_only or settings.trust_remote_code or settings.config_overrides:
        return None
    wanted = ctx.config.run.model
    source = locate(wanted.name, ctx.config.path, wanted.revision)
    if source.kind != "folder" or source.path is None:
        return None
    try:
        return _read(source.path, open_whole)
    except Exception:  # the words for files that are broken are those of the whole way
        return None


def _read(folder: Path, open_whole: Callable[[], PreTrainedTokenizerBase]) -> QuickTokenizer | None:
    from tokenizers import Tokenizer

    model, written = _json(folder / CONFIG), _json(folder / "tokenizer_config.json")
    if not _is_plain(folder, model, written):
        return None
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = {role: _text(written[role]) for role in ROLES if written.get(role) is not None}
    added = backend.get_added_tokens_decoder()
    known = {token.content for token in added.values()}
    extra = written.get("extra_special_tokens") or written.get("additional_special_tokens") or []
    tokens_there = known.issuperset(special.values()) and isinstance(extra, list) and known.issuperset(extra)
    size = backend.get_vocab_size(with_added_tokens=True)
    if not tokens_there or not _same(written.get("added_tokens_decoder"), added) or _rows(model, backend) is None:
        return None
    if backend.post_processor is None or backend.padding or backend.truncation:
        return None
    if size > MISTRAL_SIZE and not model.get("transformers_version"):
        return None
    template, beside = written.get("chat_template"), folder / "chat_template.jinja"
    template = beside.read_text(encoding="utf-8") if beside.exists() else template
    if template is not None and not isinstance(template, str):
        return None
    return QuickTokenizer(backend, special, template, str(folder), open_whole)


def _is_plain(folder: Path, model: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
    """Whether every setting is one whose meaning is known here."""
    known = {*MEANINGLESS, *ROLES, "chat_template", "added_tokens_decoder"}
    known |= {"extra_special_tokens", "additional_special_tokens"}
    unknown = {key for key in written if key not in known and not (key == "add_prefix_space" and not written[key])}
    legacy = ["added_tokens.json", "additional_chat_templates"]
    if "added_tokens_decoder" not in written:
        legacy.append("special_tokens_map.json")
    return (
        model.get("model_type") in MODEL_TYPES
        and "auto_map" not in model
        and written.get("tokenizer_class") in CLASSES
        and not unknown
        and not any((folder / name).exists() for name in legacy)
    )


def _rows(model: Mapping[str, Any], backend: Tokenizer) -> int | None:
    """Embeddings of the model, if they are enough for the tokenizer."""
    rows = model.get("vocab_size")
    enough = isinstance(rows, int) and max(backend.get_vocab(with_added_tokens=True).values()) < rows
    return rows if enough else None


def _same(written: Mapping[str, Any] | None, added: Mapping[int, AddedToken]) -> bool:
    """Whether the added tokens of `tokenizer_config.json` are those of `tokenizer.json`."""
    from tokenizers import AddedToken

    if written is None:
        return True
    there = {repr(token) for token in added.values()}
    return all(repr(AddedToken(**token)) in there for token in written.values())


def _text(token: Any) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _json(path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return read
