"""The tokenizer inside a GGUF file, as transformers has it.

Byte-level BPE (`tokenizer.ggml.model: gpt2`) is built here from the file's vocabulary and merges. How text is split
before merging is not in the file, only a name for it (`tokenizer.ggml.pre`); the table below says what the names that
we know mean. A name we do not know is refused: a tokenizer that splits differently from the one that the model was
trained with works, and is wrong. transformers' own conversion gives every such file the split of GPT-2 and, for the
`llama` architecture, the begin token as the end token; special tokens therefore always come from the file's ids
here. Other kinds (sentencepiece) go through transformers' conversion.

Source of the table: the published `tokenizer.json` of each family; llama.cpp's names for them (`llama-vocab.cpp`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox.errors import UserError, did_you_mean

from pegbox_hf.gguf_file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

CONTROL, USER_DEFINED = 3, 4
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """How text is cut before merging.

    Attributes:
        pattern: regular expression whose matches are the pieces; empty: GPT-2's.
        digits: every digit is a piece of its own, cut first.
        nfc: text is brought into Unicode's form C before.
        whole_words: a piece that is a token is taken whole, whatever the merges say.
    """

    pattern: str = ""
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False


GPT2 = Split()
DIGITS = Split(digits=True)
LLAMA3 = Split(pattern=rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}", whole_words=True)
QWEN2 = Split(pattern=rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}", nfc=True)
SPLITS = {
    "gpt-2": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}


def build(header: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, special tokens and chat template included.

    Raises:
        UserError: the file has no tokenizer, or one that cannot be rebuilt exactly.
    """
    if not isinstance(header.get("tokenizer.ggml.tokens"), list):
        raise UserError(f"{header.path} holds no tokenizer", "Its vocabulary is missing.", *_elsewhere())
    byte_level = header.get("tokenizer.ggml.model") == "gpt2"
    tokenizer = _byte_level(header) if byte_level else _by_transformers(header)
    template = header.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    length = header.get(f"{header.architecture}.context_length")
    if isinstance(length, int):
        tokenizer.model_max_length = length
    return tokenizer


def _strings(header: GgufFile, name: str) -> list[str]:
    return header.get(f"tokenizer.ggml.{name}") or []  # type: ignore[return-value]


def _special_tokens(header: GgufFile) -> dict[str, str]:
    tokens = _strings(header, "tokens")
    named = {name: header.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    return {name: tokens[token_id] for name, token_id in named.items() if isinstance(token_id, int)}


def _byte_level(header: GgufFile) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    special = _special_tokens(header)
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(header, _split(header), special), clean_up_tokenization_spaces=False, **special
    )


def _split(header: GgufFile) -> Split:
    name = header.get("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise UserError(
            f"{header.path} splits text in the way '{name}', which is not known here",
            did_you_mean(str(name), SPLITS) or f"Known ways: {', '.join(SPLITS)}.",
            *_elsewhere(),
        )
    return SPLITS[str(name)]


def _elsewhere() -> tuple[str]:
    return ("Set hf.tokenizer to a folder or hub name that holds the model's tokenizer.",)


def _bpe(header: GgufFile, split: Split, special: dict[str, str]) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = _strings(header, "tokens")
    kinds: list[int] = header.get("tokenizer.ggml.token_type") or [1] * len(tokens)  # type: ignore[assignment]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _strings(header, "merges"))]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split.whole_words))

    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern:
        steps.append(pre_tokenizers.Split(Regex(split.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split.pattern))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()

    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    control += [token for token in special.values() if token not in control]
    own = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])

    first = special.get("bos_token") if header.get("tokenizer.ggml.add_bos_token") else None
    last = special.get("eos_token") if header.get("tokenizer.ggml.add_eos_token") else None
    around = [(token, vocabulary[token]) for token in (first, last) if token]
    if around:
        single = " ".join(part for part in (first, "$A", last) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    return tokenizer


def _by_transformers(header: GgufFile) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
    for name, token in _special_tokens(header).items():
        setattr(tokenizer, name, token)
    return tokenizer
