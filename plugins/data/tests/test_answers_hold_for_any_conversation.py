"""Properties of rows with answers over generated conversations: the same prompt, answers trained, cuts at their ends.

The second reading of the text knows ChatML's markers and nothing of the code under test.
"""

from __future__ import annotations

import re

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pegbox_data.lengths import LengthRule, cut_documents

contents = st.text(
    alphabet=st.one_of(
        st.sampled_from(list(" \n\tab.,:<|>")),
        st.characters(exclude_categories=["Cs"]),
        st.just("é"),
        st.just("🙂"),
    ),
    max_size=20,
)
turns = st.tuples(st.sampled_from(["user", "assistant", "tool"]), contents)
prompts = st.tuples(
    st.lists(st.tuples(st.just("system"), contents), max_size=1), st.lists(turns, max_size=3), contents
).map(lambda drawn: [*drawn[0], *drawn[1], ("user", drawn[2])])
answers = st.lists(turns, max_size=3).flatmap(lambda rest: contents.map(lambda first: [("assistant", first), *rest]))
hundred = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ANSWER = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)
MEANT = {"equal-answers", "border-token", "empty-answer", "span-inside-token", "unequal-prompt-tokens"}


def as_messages(conversation) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


def documents(row) -> list[tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(row.documents)
    assert ends[-1] == len(row.encoded.ids)
    return [
        (row.encoded.ids[end - length : end], row.encoded.trained[end - length : end])
        for end, length in zip(ends, row.documents, strict=True)
    ]


@hundred
@given(prompts, answers, answers)
def test_answers_are_trained_behind_the_same_prompt(chatml, answered, prompt, chosen, rejected):
    asked = as_messages(prompt)
    (row,) = answered(chatml, {"prompt": asked, "chosen": as_messages(chosen), "rejected": as_messages(rejected)})
    assert row.signs == (1, -1)
    assert {one.id for one in row.found} <= MEANT
    question = chatml.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    for (ids, trained), answer in zip(documents(row), (chosen, rejected), strict=True):
        whole = chatml.apply_chat_template([*asked, *as_messages(answer)], tokenize=False)
        assert ids.tolist() == chatml(whole, add_special_tokens=False)["input_ids"]
        spoken = "".join(ANSWER.findall(whole, len(question) - len("<|im_start|>assistant\n")))
        words = chatml.decode(ids[trained], skip_special_tokens=False)
        assert words == spoken if row.encoded.border_tokens == 0 else len(words) <= len(spoken)
        before = chatml.decode(ids[: int(np.argmax(trained))], skip_special_tokens=False)
        assert before.startswith(question)


@hundred
@given(prompts, answers, answers)
def test_an_implicit_prompt_makes_the_same_row(chatml, answered, prompt, chosen, rejected):
    if chosen[0] == rejected[0]:
        chosen = [("assistant", chosen[0][1] + "x"), *chosen[1:]]
    asked, good, bad = (as_messages(one) for one in (prompt, chosen, rejected))
    (explicit,) = answered(chatml, {"prompt": asked, "chosen": good, "rejected": bad})
    (implicit,) = answered(chatml, {"chosen": asked + good, "rejected": asked + bad})
    assert implicit.encoded.ids.tolist() == explicit.encoded.ids.tolist()
    assert implicit.encoded.trained.tolist() == explicit.encoded.trained.tolist()
    assert implicit.documents == explicit.documents


@hundred
@given(prompts, answers, answers)
def test_unpaired_answers_are_the_documents_of_the_pair(chatml, answered, prompt, chosen, rejected):
    row = {"prompt": as_messages(prompt), "chosen": as_messages(chosen), "rejected": as_messages(rejected)}
    (pair,) = answered(chatml, row)
    apart = answered(chatml, row, "unpaired", unpair=True)
    alone = [
        answered(chatml, {"prompt": row["prompt"], "completion": row[name], "label": label}, "unpaired")[0]
        for name, label in (("chosen", True), ("rejected", False))
    ]
    for rows in (apart, alone):
        assert [one.signs for one in rows] == [(1,), (-1,)]
        for one, (ids, trained) in zip(rows, documents(pair), strict=True):
            assert one.encoded.ids.tolist() == ids.tolist()
            assert one.encoded.trained.tolist() == trained.tolist()


@hundred
@given(prompts, answers, answers, st.integers(min_value=2, max_value=80))
def test_a_cut_takes_ends_of_answers_and_leaves_the_prompt_whole(chatml, answered, prompt, chosen, rejected, longest):
    (row,) = answered(
        chatml, {"prompt": as_messages(prompt), "chosen": as_messages(chosen), "rejected": as_messages(rejected)}
    )
    left = LengthRule(longest, None, "truncate", frozenset()).answers(row.documents, row.encoded.trained)
    parts = documents(row)
    prompt_tokens = [int(np.argmax(trained)) for _, trained in parts]
    if not left.documents:
        assert any(
            longest <= start or not trained[:longest].any()
            for start, (_, trained) in zip(prompt_tokens, parts, strict=True)
        )
        return
    kept, ids, trained = cut_documents(row.documents, row.encoded.ids, row.encoded.trained, longest)
    assert kept == left.documents == tuple(min(length, longest) for length in row.documents)
    assert left.trained == trained.sum()
    at = 0
    for length, start, (all_ids, all_trained) in zip(kept, prompt_tokens, parts, strict=True):
        assert start < length
        assert ids[at : at + length].tolist() == all_ids[:length].tolist()
        assert trained[at : at + length].tolist() == all_trained[:length].tolist()
        at += length


words = st.lists(st.sampled_from(["what", "is", "the", "answer,", "four", "new", "less", "日本"]), max_size=4)


@hundred
@given(words.filter(bool), words, words)
def test_plain_texts_split_at_words_and_lose_none(chatml, answered, shared, chosen, rejected):
    texts = [" ".join([*shared, *answer]) for answer in (chosen, rejected)]
    if len({text.split()[0] for text in texts}) != 1 or min(map(len, (shared + chosen, shared + rejected))) < 2:
        return
    (row,) = answered(chatml, {"chosen": texts[0], "rejected": texts[1]}, chat_template=False)
    for (ids, trained), text in zip(documents(row), texts, strict=True):
        assert chatml.decode(ids) == f"{text}</s>"
        answer = chatml.decode(ids[trained])
        assert answer.startswith(" ") or answer == "</s>"
        assert text.endswith(answer.removesuffix("</s>"))
