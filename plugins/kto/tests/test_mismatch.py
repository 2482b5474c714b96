"""Prompts get the answers of the row before, each answer once, and nothing grows longer than the longest row."""

from __future__ import annotations

from collections import Counter

import pytest
from kto_rows import Answer, example_of, pair_of, random_answers
from pegbox.rows import UNTRAINED, Example
from pegbox_kto.mismatch import mismatched


def parts(example: Example) -> tuple[list[int], list[int]]:
    """Prompt and answer."""
    ids, labels = list(map(int, example.input_ids)), list(map(int, example.labels))
    prompt = sum(label == UNTRAINED for label in labels)
    assert labels == [UNTRAINED] * prompt + ids[prompt:]
    return ids[:prompt], ids[prompt:]


def test_each_prompt_gets_the_answer_of_the_row_before() -> None:
    answers = random_answers(5)
    rows = [example_of(answer) for answer in answers]
    made = mismatched(rows, rows[-1])
    assert [parts(one) for one in made] == [(answers[at].prompt, answers[at - 1].ids) for at in range(5)]
    assert {one.signs for one in made} == {(0,)}


def test_both_answers_of_a_preference_move_to_another_prompt() -> None:
    answers = random_answers(6, seed=1)
    rows = [pair_of(*answers[at : at + 2]) for at in (0, 2, 4)]
    made = [parts(one) for one in mismatched(rows, rows[-1])]
    assert made == [(answers[at].prompt, answers[at - 2].ids) for at in range(6)]
    assert Counter(map(tuple, (answer for _, answer in made))) == Counter(tuple(answer.ids) for answer in answers)


def test_a_row_alone_and_a_preference_exchange_answers() -> None:
    one, chosen, rejected = random_answers(3, seed=2)
    rows = [example_of(one), pair_of(chosen, rejected)]
    made = [parts(row)[1] for row in mismatched(rows, rows[-1])]
    assert made == [chosen.ids, one.ids, one.ids]


def test_a_document_longer_than_the_longest_loses_the_end_of_its_answer() -> None:
    rows = [example_of(Answer([1, 2, 3, 4], [5], True)), example_of(Answer([6], [7, 8, 9], False))]
    made = [parts(row) for row in mismatched(rows, rows[-1])]
    assert made == [([1, 2, 3, 4], [7]), ([6], [5])]


@pytest.mark.parametrize("labels", [[10, 11, 12], [UNTRAINED, 11, 12]])
def test_a_prompt_has_the_first_token_which_is_never_predicted(labels: list[int]) -> None:
    row = Example(input_ids=[10, 11, 12], labels=labels, signs=(1,))
    (made,) = mismatched([row], example_of(Answer([1], [2, 3], True)))
    assert parts(made) == ([10], [2, 3])


def test_untrained_tokens_within_an_answer_stay_untrained() -> None:
    row = Example(input_ids=[1, 2, 3, 4], labels=[UNTRAINED, 2, UNTRAINED, 4], signs=(1,))
    (made,) = mismatched([example_of(Answer([9], [8, 8, 8], True))], row)
    assert list(made.input_ids) == [9, 2, 3, 4]
    assert list(made.labels) == [UNTRAINED, 2, UNTRAINED, 4]
