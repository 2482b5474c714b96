"""The format `input_output`: text in segments, each trained or not, without any template.

The segments are joined as they stand and tokenized as one text: whoever writes them writes every special token too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pegbox.errors import DataError
from pegbox.section import Section, setting

from pegbox_data.formats import Rendered, Span, column
from pegbox_data.messages import parsed, shown

if TYPE_CHECKING:
    from pegbox.types import Processor

    from pegbox_data.formats import Renderer, SourceRow


class SegmentsOptions(Section):
    """Options of the format `input_output`."""

    bos: bool = setting(False, "Put the tokenizer's BOS before the first segment.")
    eos: bool = setting(False, "Put EOS after the last segment; it is trained.")


class SegmentsFormat:
    """Rows with a list of segments, each with a text and a label: true is trained."""

    fields: ClassVar[Mapping[str, str]] = {"segments": "segments", "text": "text", "label": "label"}
    options = SegmentsOptions

    def open(self, fields: Mapping[str, str], options: SegmentsOptions, processor: Processor) -> Renderer:
        def render(row: SourceRow) -> Rendered:
            name = fields["segments"]
            segments = parsed(column(row, name, "segments"), name)
            if not isinstance(segments, list | tuple) or not segments:
                raise DataError(
                    f"'{name}' is {shown(segments)}",
                    "It must be a list of segments.",
                    "Write it as [{text: ..., label: false}, {text: ..., label: true}].",
                )
            text, spans = "", list[Span]()
            for number, segment in enumerate(segments, 1):
                own, trained = _segment(segment, fields, number)
                if trained and own and spans and spans[-1].end == len(text):
                    spans[-1] = Span(spans[-1].start, len(text) + len(own), len(text) + len(own))
                elif trained and own:
                    spans.append(Span(len(text), len(text) + len(own), len(text) + len(own)))
                text += own
            return Rendered(text, spans, bos=options.bos, eos=options.eos)

        return render


input_output = SegmentsFormat()


def _segment(segment: Any, fields: Mapping[str, str], number: int) -> tuple[str, bool]:
    text = segment.get(fields["text"]) if isinstance(segment, Mapping) else None
    label = segment.get(fields["label"]) if isinstance(segment, Mapping) else None
    if not isinstance(text, str) or not isinstance(label, bool):
        raise DataError(
            f"segment {number} is {shown(segment)}",
            "A segment has a text and a label, true or false.",
            "Write it as {text: ..., label: true}.",
        )
    return text, label
