"""Rows with signs keep their documents and signs through cache, streams, mixing and the length rule."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from pegbox.errors import DataError
from pegbox_data.encoding import Encoder
from pegbox_data.loading import Datasets
from pegbox_data.pieces import ARRAYS

PLAIN = {"chat_template": False}


def pair(number: int, prompt: int = 3, chosen: int = 4, rejected: int = 5) -> dict[str, object]:
    """A row whose lengths in tokens are known: every word is a letter of its own, EOS comes after each answer."""
    return {
        "prompt": "q" * prompt,
        "chosen": "x" * chosen,
        "rejected": "z" * rejected,
        "margin": number / 2,
    }


def entry(form: str = "preference", path: str = "rows.jsonl", **keys: object) -> dict[str, object]:
    return {"path": path, "format": form, "options": PLAIN, **keys}


UNPAIR = {"options": {**PLAIN, "unpair": True}}


def content(examples) -> list[tuple[object, ...]]:
    made = [examples[index] for index in range(len(examples))]
    return [
        (list(one.input_ids), list(one.labels), one.documents, one.signs, dict(one.columns), examples.describe(index))
        for index, one in enumerate(made)
    ]


def documents(example) -> list[tuple[list[int], list[int]]]:
    made, at = [], 0
    for length in example.documents:
        made.append((list(example.input_ids[at : at + length]), list(example.labels[at : at + length])))
        at += length
    assert at == len(example.input_ids) == len(example.labels)
    return made


def report(workspace, data) -> str:
    datasets = Datasets(workspace.context(data), workspace.processor())
    datasets.split("train")
    return "\n".join(datasets.report)


@pytest.fixture
def streams(workspace):
    opened = []

    def stream(data):
        opened.append(workspace.examples({**data, "streaming": True, "cache": "off"}))
        return opened[-1]

    yield stream
    for one in opened:
        one.close()


def rows(count: int) -> list[dict[str, object]]:
    return [pair(number, 1 + number % 4, 1 + number % 7, 1 + number % 5) for number in range(count)]


FORMS = {"pairs": entry(), "unpaired": entry("unpaired", **UNPAIR)}


@pytest.mark.parametrize("name", FORMS)
def test_kept_rows_are_those_that_were_made(name, workspace, monkeypatch):
    workspace.write("rows.jsonl", rows(600))
    data = {"train": [FORMS[name]], "columns": ["margin"], "workers": 1}
    made = content(workspace.examples({**data, "cache": "off"}))
    assert content(workspace.examples({**data, "cache": "off", "workers": 2})) == made
    assert content(workspace.examples({**data, "cache": "kept"})) == made
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("tokenized again"))
    assert content(workspace.examples({**data, "cache": "kept"})) == made
    assert len(made) == (600 if name == "pairs" else 1200)
    assert {len(one[3]) for one in made} == ({2} if name == "pairs" else {1})
    assert [one[4]["margin"] for one in made[:4]] == ([0, 0.5, 1, 1.5] if name == "pairs" else [0, 0, 0.5, 0.5])


def test_kept_rows_of_a_layout_without_signs_are_made_again(workspace):
    """Keys hold the layout's number; and a piece without one of the arrays is none."""
    workspace.write("rows.jsonl", rows(300))
    data = {"train": [entry()], "cache": "kept"}
    made = content(workspace.examples(data))
    (about,) = workspace.folder.glob("kept/**/piece.json")
    known = json.loads(about.read_text())
    about.write_text(json.dumps({**known, "files": {k: v for k, v in known["files"].items() if k != "answers"}}))
    assert content(workspace.examples(data)) == made
    assert json.loads(about.read_text()) == known
    (about.parent / "signs.bin").write_bytes(b"\0" * 600)
    assert content(workspace.examples(data)) == made


def test_rows_without_signs_keep_no_array_of_them(workspace):
    workspace.write("rows.jsonl", [{"prompt": "q", "completion": "x"}] * 300)
    examples = workspace.examples({"train": [entry("completion")], "cache": "kept"})
    assert examples[0].signs == examples[0].documents == ()
    sizes = {name: [path.stat().st_size for path in workspace.folder.glob(f"kept/**/{name}.bin")] for name in ARRAYS}
    assert sizes["answers"] == sizes["documents"] == sizes["signs"] == sizes["column_lengths"] == [0]


def test_rows_with_and_without_signs_share_a_part(workspace):
    """A format of a third party may make either of each row, a batch of rows apart."""
    from collections.abc import Mapping
    from typing import ClassVar

    from pegbox.hooks import hookimpl
    from pegbox.section import Section
    from pegbox.types import Item
    from pegbox_data.formats import Answers, Rendered, Span

    class Mixed:
        fields: ClassVar[Mapping[str, str]] = {}
        options = type("Nothing", (Section,), {"__doc__": "No options."})

        def open(self, fields, options, processor):
            def render(row):
                texts = [Rendered(f"q{word}", [Span(1, 2, 2)], columns=None) for word in row["words"]]
                return Answers(texts, [1, -1, 0][: len(texts)]) if len(texts) > 1 else texts[0]

            return render

    class MixedPlugin:
        @hookimpl
        def register_items(self):
            return [Item(kind="format", name="mixed", target=Mixed())]

    kinds = [["x"]] * 300 + [["x", "z"], ["x"]] * 150 + [["y"]] * 300 + [["x", "y", "z"]]
    workspace.write("rows.jsonl", [{"words": words} for words in kinds])
    data = {"train": [{"path": "rows.jsonl", "format": "mixed"}], "workers": 1}
    for cache in ("off", "kept", "kept"):
        examples = workspace.examples({**data, "cache": cache}, plugins={"mixed": MixedPlugin()})
        made = [examples[index] for index in range(len(examples))]
        assert [one.signs for one in made] == [((1, -1, 0)[: len(w)] if len(w) > 1 else ()) for w in kinds]
        assert [one.documents for one in made] == [((2,) * len(w) if len(w) > 1 else ()) for w in kinds]
        assert workspace.words(examples) == ["".join(words) for words in kinds]
        longest = workspace.examples({**data, "cache": cache, "max_length": 2}, plugins={"mixed": MixedPlugin()})
        assert len(longest) == len(kinds)


LENGTHS = [
    {},
    {"max_length": 9},
    {"max_length": 6, "overlong": "truncate"},
    {"max_length": 9, "min_length": 4},
]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rule", LENGTHS)
def test_a_stream_gives_the_rows_of_memory(name, rule, workspace, streams):
    workspace.write("rows.jsonl", rows(150))
    data = {"train": [FORMS[name]], "columns": ["margin"], **rule}
    expected = content(workspace.examples({**data, "cache": "off"}))
    assert len(expected) > 20
    stream = streams(data)
    window = stream.take(len(expected))
    assert content(window) == expected
    assert window.lengths.tolist() == [len(one[0]) for one in expected]
    assert content(stream.take(5)) == expected[:5]


def test_a_stream_goes_on_between_the_two_rows_of_a_pair(workspace, streams):
    workspace.write("rows.jsonl", rows(20))
    data = {"train": [FORMS["unpaired"]]}
    expected = content(workspace.examples({**data, "cache": "off"}))
    stream = streams(data)
    stream.take(7)
    state = stream.state_dict()
    resumed = streams(data)
    resumed.load_state_dict(state)
    assert content(resumed.take(33)) == content(stream.take(33)) == expected[7:]


def test_a_row_and_its_opposite_are_no_duplicates(workspace):
    labels = [True, False, True]
    workspace.write("rows.jsonl", [{"prompt": "q", "completion": "x", "label": label} for label in labels])
    examples = workspace.examples({"train": [entry("unpaired")], "deduplicate": True})
    assert [examples[index].signs for index in range(len(examples))] == [(1,), (-1,)]


def test_both_answers_to_a_prompt_are_held_out_together(workspace):
    workspace.write("rows.jsonl", [{**pair(number), "prompt": "q" * (number + 1)} for number in range(20)])
    data = {"train": [FORMS["unpaired"]], "eval_rows": 6}
    kept, out = (workspace.examples(data, split=split) for split in ("train", "eval"))
    where = [{rows.describe(index) for index in range(len(rows))} for rows in (kept, out)]
    assert not where[0] & where[1]
    assert (len(where[0]), len(kept), len(where[1]), len(out)) == (14, 28, 6, 12)


def test_weights_and_shuffling_keep_pairs_whole(workspace):
    workspace.write("rows.jsonl", rows(40))
    plain = {str(one[:4]) for one in content(workspace.examples({"train": [entry()]}))}
    mixed = content(workspace.examples({"train": [entry(weight=1.5)], "shuffle": True}))
    assert len(mixed) == 60
    assert {str(one[:4]) for one in mixed} == plain


def test_the_longest_document_counts_not_the_row(workspace):
    workspace.write("rows.jsonl", [pair(0, 3, 4, 5), pair(1, 3, 4, 6)])
    whole = workspace.examples({"train": [entry()]})
    assert [whole[index].documents for index in range(2)] == [(8, 9), (8, 10)]
    assert whole.lengths.tolist() == [17, 18]
    data = {"train": [entry()], "max_length": 9}
    examples = workspace.examples(data)
    assert content(examples) == content(whole)[:1]
    assert "1 rows dropped: longer than data.max_length (9 tokens) (first: line 2)" in report(workspace, data)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has 10 tokens, data\.max_length is 9"):
        workspace.examples({**data, "overlong": "error"})


def test_the_shortest_document_counts_too(workspace):
    workspace.write("rows.jsonl", [pair(0, 3, 4, 5), pair(1, 3, 1, 6)])
    assert len(workspace.examples({"train": [entry()], "min_length": 8})) == 1


def test_truncation_cuts_answers_and_keeps_their_prompt(workspace):
    workspace.write("rows.jsonl", [pair(0, 3, 4, 5), pair(1, 8, 1, 6), pair(2, 10, 1, 1), pair(3, 12, 2, 2)])
    whole = workspace.examples({"train": [entry()]})
    data = {"train": [entry()], "max_length": 10, "overlong": "truncate"}
    cut = workspace.examples(data)
    assert [cut[index].documents for index in range(len(cut))] == [(8, 9), (10, 10)]
    assert content(cut)[0] == content(whole)[0]
    for (ids, labels), (all_ids, all_labels) in zip(documents(cut[1]), documents(whole[1]), strict=True):
        assert ids == all_ids[:10]
        assert labels == all_labels[:10]
    lines = report(workspace, data)
    assert "1 rows cut to data.max_length (10 tokens) (first: line 2)" in lines
    assert "2 rows dropped: their prompt leaves no room for an answer within data.max_length (first: line 3)" in lines
    assert cut.lengths.tolist() == [17, 20]
    assert cut.trained_tokens == sum(int(np.sum(np.asarray(cut[i].labels) != -100)) for i in range(2))


def test_a_format_of_a_third_party_cannot_have_answers_split(workspace):
    from pegbox_data.lengths import LengthRule

    left = LengthRule(4, None, "split", frozenset()).answers((3, 5), np.ones(8, dtype=bool))
    assert isinstance(left.error, DataError)


def test_prompts_pass_the_audit_and_the_length_rule(workspace, streams, caplog):
    caplog.set_level(logging.INFO, logger="pegbox")
    workspace.write("rows.jsonl", [{"prompt": "q" * length, "id": length} for length in (3, 9, 4)])
    data = {"train": [entry("prompts")], "columns": ["id"], "max_length": 8}
    examples = workspace.examples(data)
    assert [list(one[0]) for one in content(examples)] == [[*([examples[0].input_ids[0]] * n)] for n in (3, 4)]
    assert examples.trained_tokens == 0
    assert content(streams(data).take(2)) == content(examples)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: the row has 9 tokens"):
        workspace.examples({**data, "overlong": "error"})


def test_chats_without_a_trained_token_still_stop_a_run_beside_prompts(workspace):
    workspace.write("rows.jsonl", [{"prompt": "q"}])
    workspace.write("chats.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(DataError, match=r"chats\.jsonl:1: .*no-trained-token"):
        workspace.examples({"train": [entry("prompts"), {"path": "chats.jsonl"}]})
