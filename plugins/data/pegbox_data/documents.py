"""The format `pretraining`: plain text, all of it trained, with EOS between documents.

A document that is longer than `data.max_length` is cut into several rows; EOS stands after its last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.section import Section, setting

from pegbox_data.formats import Rendered, Span, column
from pegbox_data.messages import shown

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow


class PretrainingOptions(Section):
    """Options of the format `pretraining`."""

    bos: bool = setting(True, "Put the tokenizer's BOS before each document, if it has one.")
    eos: bool = setting(True, "Put EOS after each document; it is trained.")
    split: bool = setting(True, "Cut documents longer than `data.max_length` into several rows.")


class PretrainingFormat:
    """Rows with a text."""

    fields: ClassVar[Mapping[str, str]] = {"text": "text"}
    options = PretrainingOptions

    def open(self, fields: Mapping[str, str], options: PretrainingOptions, processor: Processor) -> Renderer:
        def render(row: SourceRow) -> Rendered:
            text: Any = column(row, fields["text"], "text")
            if not isinstance(text, str):
                raise DataError(f"'{fields['text']}' is {shown(text)}", "It must be a string.", "Write it as text.")
            whole = [Span(0, len(text), len(text))]
            return Rendered(text, whole, bos=options.bos, eos=options.eos, split=options.split)

        return render


pretraining = PretrainingFormat()
