"""A chat template, compiled once and rendered many times.

Chat templates are Jinja with a documented environment
(https://huggingface.co/docs/transformers/chat_templating): immutable sandbox, trimmed blocks, loop controls,
the functions `raise_exception` and `strftime_now`, the filter `tojson`, and the tag `{% generation %}` around
what an assistant generates. The same environment is built here, because rendering is called for every message
of every row, and because the tag's blocks must be told apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import CodeType, MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.parser import Parser
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

EXACT = "generation blocks are exact"
"""A template whose comment says so has one block for each assistant message: from where the generation prompt ends to
the end of the turn. Its blocks are the mask, and no further rendering is needed."""


class Talk(NamedTuple):
    """What a template renders: messages, the tools they may call, and variables of this row alone."""

    messages: Sequence[Message]
    tools: object = None
    variables: Mapping[str, object] = MappingProxyType({})

    def first(self, count: int) -> Talk:
        """The same with the first so many messages."""
        return self._replace(messages=self.messages[:count])


class RenderError(Exception):
    """The template refused the messages, or failed on them; the message is the template's own."""


class GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: notes where each block lies in the text rendered so far."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.pieces: list[str] = []
        self.blocks: list[tuple[int, str]] = []

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Any) -> str:
        text: str = caller()
        self.blocks.append((sum(map(len, self.pieces)), text))
        return text


class ChatTemplate:
    """The template of one tokenizer.

    Args:
        text: the Jinja source.
        name: what messages call it.
        variables: special tokens and other variables that every rendering gets.

    Attributes:
        gaps: texts between the contents of two messages, with their roles, in which it was proven after how many
            characters the turn of the first one ends.
    """

    def __init__(self, text: str, name: str, variables: Mapping[str, object]) -> None:
        self.text, self.name = text, name
        self._variables = dict(variables)
        environment = _environment()
        self._tag: GenerationTag = environment.extensions[GenerationTag.identifier]  # type: ignore[assignment]
        self._template = environment.template_class.from_code(
            environment, _compiled(text), environment.make_globals(None)
        )
        self.has_markers = re.search(r"\{%[-+]?\s*generation\s*[-+]?%\}", text) is not None
        self.exact = self.has_markers and EXACT in text
        self.gaps: dict[object, int] = {}

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, object]) -> ChatTemplate | None:
        """The tokenizer's own template, or None if it has none. Of several named ones, `default`."""
        text = tokenizer.chat_template
        if isinstance(text, dict):
            text = text.get("default")
        if not text:
            return None
        name = tokenizer.name_or_path or type(tokenizer).__name__
        return cls(text, f"the chat template of {name}", {**tokenizer.special_tokens_map, **variables})

    def render(self, talk: Talk, prompt: bool = False) -> str:
        """The text of a conversation; with `prompt` followed by what invites the assistant to speak."""
        return "".join(self._pieces(talk, prompt))

    def render_marked(self, talk: Talk) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and the character ranges of its `{% generation %}` blocks.

        No ranges if one of them cannot be told, as in a template that collects its output in a macro first.
        """
        self._tag.blocks = []
        self._tag.pieces = pieces = []
        for piece in self._pieces(talk, prompt=False):
            pieces.append(piece)
        text = "".join(pieces)
        ranges = [(start, start + len(block)) for start, block in self._tag.blocks]
        certain = all(text.startswith(block, start) for start, block in self._tag.blocks)
        return text, ranges if certain else []

    def _pieces(self, talk: Talk, prompt: bool) -> Any:
        context = self._template.new_context(
            {
                "messages": talk.messages,
                "tools": talk.tools,
                "documents": None,
                "add_generation_prompt": prompt,
                **self._variables,
                **talk.variables,
            }
        )
        try:
            yield from self._template.root_render_func(context)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise RenderError(str(error) or type(error).__name__) from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


@lru_cache(maxsize=64)
def _compiled(text: str) -> CodeType:
    """The code of a template, which every environment of this kind can run: entries of a config share templates."""
    return _environment().compile(text)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
