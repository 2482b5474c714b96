"""A tokenizer small enough to be trained in each test session, given the chat templates of real models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.events import RunStarted
from pegbox.plan import compose
from pegbox.rows import Examples, Split
from pegbox.types import Processor
from pegbox_data.chat import ChatOptions, chat
from pegbox_data.encoding import Encoder
from pegbox_data.findings import Found
from pegbox_data.formats import TEMPLATES, Renderer
from pegbox_data.preference import preference
from pegbox_data.rows import Row, RowEncoder
from pegbox_data.sources import Entry
from pegbox_data.unpaired import unpaired
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "Hello world, what is the answer? It is four.\n\nI think so, and you?\n\nlead trail new one two three "
    "less more ünïcödé 日本 user assistant system"
)
SPECIAL = re.compile(
    r"<[|｜][^<>\s'\"]*?[|｜]>|</?s>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<end_of_utterance>|\[/?INST\]"
)


@lru_cache
def _trained_bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 420 entries, with every special token that `template` writes."""
    tokenizer = Tokenizer.from_str(_trained_bpe())
    special = sorted({*SPECIAL.findall(template or ""), "<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@lru_cache
def tiny_tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The small tokenizer with a template of TRL."""
    tokenizer = tiny_tokenizer(trl_template(name))
    tokenizer.name_or_path = f"models/{name}"
    return tokenizer


def trl_template(name: str) -> str:
    """A chat template as it ships with TRL."""
    spec = find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    return (Path(spec.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def processor_of(tokenizer: PreTrainedTokenizerBase) -> Processor:
    """With the built-in templates that a test put into `tokenizer.twins`."""
    parts = {TEMPLATES: tokenizer.twins} if hasattr(tokenizer, "twins") else {}
    return Processor(tokenizer=tokenizer, pad_id=0, fingerprint=f"test-{tokenizer.chat_template}", parts=parts)


@dataclass(frozen=True)
class Trained:
    """One conversation, rendered and tokenized."""

    text: str
    ids: np.ndarray
    mask: np.ndarray
    border_tokens: int
    tokenizer: PreTrainedTokenizerBase
    notes: tuple[Found, ...] = ()

    @property
    def words(self) -> str:
        """The trained tokens, decoded."""
        return str(self.tokenizer.decode(self.ids[self.mask], skip_special_tokens=False))


@lru_cache
def opened(tokenizer: PreTrainedTokenizerBase, template: str, options: str) -> Renderer:
    """The format `chat`, each `template` compiled once."""
    return chat.open(chat.fields, ChatOptions.model_validate_json(options), processor_of(tokenizer))


@lru_cache
def encoder_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Encoder:
    """The encoder of a tokenizer of this size, made once."""
    return Encoder(processor_of(tokenizer))


def train_mask(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Any = None,
    columns: Any = None,
    **options: Any,
) -> Trained:
    """Render and tokenize one conversation as the format `chat` does."""
    row = {"messages": messages, **({"tools": tools} if tools else {}), **(columns or {})}
    rendered = opened(tokenizer, str(tokenizer.chat_template), json.dumps(options))(row)
    with encoder_of(tokenizer, len(tokenizer)).session() as encoder:
        (encoded,) = encoder.encode([rendered])
        found = tuple(encoder.audit(rendered, encoded))
    return Trained(rendered.text, encoded.ids, encoded.trained, encoded.border_tokens, tokenizer, found)


@lru_cache
def answering(tokenizer: PreTrainedTokenizerBase, form: str, options: str) -> Renderer:
    """One of the formats with answers, opened once."""
    kind = {"preference": preference, "unpaired": unpaired}[form]
    return kind.open(kind.fields, kind.options.model_validate_json(options), processor_of(tokenizer))


def answer_rows(tokenizer: PreTrainedTokenizerBase, row: Any, form: str = "preference", **options: Any) -> list[Row]:
    """The rows that a source row with answers becomes."""
    with encoder_of(tokenizer, len(tokenizer)).session() as encoder:
        encode = RowEncoder(answering(tokenizer, form, json.dumps(options)), encoder, ())
        batch = encode([Entry(1, row)], 0)
    assert not batch.errors, batch.errors
    return batch.rows


@dataclass(frozen=True)
class OneProcess:
    """The runtime of a run of one process, as far as data needs it."""

    rank: int = 0


class Workspace:
    """A folder with data files, and runs configured in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()

    def write(self, name: str, content: str | bytes | list[Any]) -> Path:
        """A file; of a list each element becomes a line of JSON."""
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def context(self, data: str | dict[str, Any], plugins: dict[str, object] | None = None, seed: int = 0) -> Context:
        """A composed run whose section `data` is given as YAML text or as a mapping."""
        section = data if isinstance(data, str) else json.dumps(data)
        names = ", ".join(["data", *(plugins or {})])
        config = self.folder / "config.yaml"
        head = f"model: {{name: none}}\nplugins: [{names}]\nseed: {seed}\noutput: {self.folder}/run\n"
        config.write_text(f"{head}data: {section}\n")
        return compose(config, instances=plugins)

    def examples(
        self,
        data: str | dict[str, Any],
        split: Split = "train",
        plugins: dict[str, object] | None = None,
        seed: int = 0,
    ) -> Any:
        """The rows of one split. They are built before there is a runtime; what became of them is told afterwards."""
        ctx = self.context(data, plugins, seed)
        rows = ctx.call(hooks.build_dataset, ctx, processor_of(self.tokenizer), split)
        self.start(ctx)
        return rows

    def processor(self) -> Processor:
        """The small tokenizer, as `load_processor` would give it."""
        return processor_of(self.tokenizer)

    def start(self, ctx: Context, rank: int = 0) -> None:
        """Tell the plugins that the run starts."""
        ctx.runtime = OneProcess(rank)  # type: ignore[assignment]
        ctx.notify(RunStarted(job=None, step=0))  # type: ignore[arg-type]

    def words(self, examples: Examples) -> list[str]:
        """The trained tokens of each row, decoded."""
        return [
            self.tokenizer.decode([label for label in examples[i].labels if label != -100])
            for i in range(len(examples))
        ]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))
    return Workspace(tmp_path)


@pytest.fixture(scope="session")
def tokenizer_with() -> Callable[[str | None], PreTrainedTokenizerFast]:
    """Makes the small tokenizer with a template."""
    return tiny_tokenizer


@pytest.fixture(scope="session")
def tokenizer_of() -> Callable[[str], PreTrainedTokenizerFast]:
    """Makes the small tokenizer with a template that ships with TRL, by name."""
    return tiny_tokenizer_of


@pytest.fixture(scope="session")
def masked() -> Callable[..., Trained]:
    """`masked(tokenizer, messages, **options)` renders and tokenizes a conversation."""
    return train_mask


@pytest.fixture(scope="session")
def answered() -> Callable[..., list[Row]]:
    """`answered(tokenizer, row, form, **options)`: the rows that a source row with answers becomes."""
    return answer_rows


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()
