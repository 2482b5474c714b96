"""Built-in chat templates that may render the same text as a tokenizer's own one.

The own template stays the truth of the text. Where it rewrites history and has no blocks to go by, a twin with exact
blocks that renders the identical text, letter by letter, says what is trained in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pegbox_data.declared import imported
from pegbox_data.formats import TEMPLATES
from pegbox_data.template import EXACT, ChatTemplate, RenderError, Talk

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Item, Processor

ADDRESS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass
class Twins:
    """Templates by name, compiled when first needed; the one that fitted last is tried first.

    `fitted`: one of them fitted an earlier row, so that it is worth trying first.
    """

    texts: Mapping[str, str]
    variables: Mapping[str, object]
    fitted: bool = False
    _compiled: list[ChatTemplate] = field(default_factory=list)

    @classmethod
    def of(cls, processor: Processor, variables: Mapping[str, object]) -> Twins:
        """Those that a processor carries."""
        known = processor.parts.get(TEMPLATES)
        texts = {str(name): str(text) for name, text in known.items()} if isinstance(known, Mapping) else {}
        return cls({name: text for name, text in texts.items() if EXACT in text}, variables)

    def blocks(self, talk: Talk, text: str, count: int) -> Sequence[tuple[int, int]]:
        """The blocks of the twin that renders this text with so many of them; none if no twin does."""
        for twin in self._ordered():
            try:
                rendered, blocks = twin.render_marked(talk)
            except RenderError:
                continue
            if rendered == text and len(blocks) == count:
                self._compiled.remove(twin)
                self._compiled.insert(0, twin)
                self.fitted = True
                return blocks
        return ()

    def _ordered(self) -> Iterator[ChatTemplate]:
        if not self._compiled and self.texts:
            self._compiled = [ChatTemplate(text, name, self.variables) for name, text in self.texts.items()]
        return iter(list(self._compiled))


def with_templates(ctx: Context, processor: Processor) -> Processor:
    """The processor with the templates that active plugins declare."""
    texts = {name: _text(item) for name, item in ctx.items("template").items()}
    return replace(processor, parts={**processor.parts, TEMPLATES: texts}) if texts else processor


def _text(item: Item) -> str:
    inline = isinstance(item.target, str) and not ADDRESS.fullmatch(item.target)
    return str(item.target) if inline else str(imported(item))
