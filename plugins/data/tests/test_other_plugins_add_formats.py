"""A format or source of another plugin is an item like our own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import pytest
from pegbox.errors import ConfigError, DataError
from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import Item
from pegbox_data.formats import Rendered, Span
from pegbox_data.sources import Entry, NoOptions, Place


class ShoutOptions(Section):
    """Options of the format below."""

    times: int = setting(1, "How often the word is said.", unit="1", ge=1)


class Shout:
    """Trains a word in capitals after a colon."""

    fields: ClassVar[Mapping[str, str]] = {"word": "word"}
    options = ShoutOptions

    def open(self, fields, options, processor):
        def render(row):
            said = row[fields["word"]].upper() * options.times
            if not said.isalpha():
                raise DataError(f"'{said}' is no word", "", "Use letters.")
            return Rendered(f"say:{said}", [Span(4, 4 + len(said), 4 + len(said))], eos=True)

        return render


class WordList:
    """One word per line."""

    suffixes: ClassVar[tuple[str, ...]] = (".words",)

    options = NoOptions

    def read(self, file, options, start):
        with file.open() as opened:
            for line, word in enumerate(opened.read().decode().splitlines(), 1):
                if line > start.line:
                    yield Entry(line, {"word": word}, behind=Place(line, line))


class ShoutPlugin:
    @hookimpl
    def register_items(self):
        return [
            Item(kind="format", name="shout", target=Shout()),
            Item(kind="source", name="words", target=WordList()),
        ]


def test_its_rows_are_tokenized_and_masked(workspace):
    workspace.write("rows.words", "four\nhello\n")
    data = "{train: [{path: rows.words, format: shout, options: {times: 2}}]}"
    examples = workspace.examples(data, plugins={"shout": ShoutPlugin()})
    assert workspace.words(examples) == ["FOURFOUR</s>", "HELLOHELLO</s>"]


def test_its_errors_get_file_and_line(workspace):
    workspace.write("rows.words", "four\n5\n6\n")
    with pytest.raises(DataError, match=r"rows\.words:2: '5' is no word \(the first of 2 bad rows among 3\)"):
        workspace.examples("{train: [{path: rows.words, format: shout}]}", plugins={"shout": ShoutPlugin()})


def test_its_options_are_validated_like_any_section(workspace):
    workspace.write("rows.words", "four\n")
    with pytest.raises(ConfigError, match=r"unknown key 'tims'(.|\n)*'times'"):
        workspace.examples(
            "{train: [{path: rows.words, format: shout, options: {tims: 2}}]}",
            plugins={"shout": ShoutPlugin()},
        )
