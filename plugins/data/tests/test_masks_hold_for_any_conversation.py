"""Properties of masks over generated conversations, with contents that hold anything but special tokens."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

contents = st.text(
    alphabet=st.one_of(
        st.sampled_from(list(" \n\tab.,:<|>")),
        st.characters(exclude_categories=["Cs"]),
        st.just("é"),
        st.just("🙂"),
    ),
    max_size=24,
)
turns = st.tuples(st.sampled_from(["user", "assistant", "system", "tool"]), contents)
conversations = st.lists(turns, min_size=1, max_size=7).filter(lambda turns: any(r == "assistant" for r, _ in turns))
hundred = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_messages(conversation):
    return [{"role": role, "content": content} for role, content in conversation]


@hundred
@given(conversations)
def test_trained_tokens_spell_the_answers_but_for_border_tokens(chatml, masked, conversation):
    result = masked(chatml, as_messages(conversation))
    expected = "".join(f"{content}<|im_end|>" for role, content in conversation if role == "assistant")
    if result.border_tokens == 0:
        assert result.words == expected
    else:
        assert len(result.words) < len(expected)


@hundred
@given(conversations)
def test_every_character_lies_in_exactly_one_token(chatml, masked, conversation):
    result = masked(chatml, as_messages(conversation))
    assert chatml.decode(result.ids, skip_special_tokens=False) == result.text
    assert result.ids.tolist() == chatml(result.text, add_special_tokens=False)["input_ids"]


@hundred
@given(conversations, st.data())
def test_what_others_say_does_not_change_what_is_trained(chatml, masked, conversation, data):
    changed = [
        (role, content if role == "assistant" else data.draw(contents, label="other content"))
        for role, content in conversation
    ]
    before, after = (masked(chatml, as_messages(c)) for c in (conversation, changed))
    assert before.words == after.words
    assert before.mask.sum() == after.mask.sum()


@hundred
@given(conversations, st.data())
def test_untrained_answers_take_exactly_their_tokens_out_of_the_mask(chatml, masked, conversation, data):
    messages = as_messages(conversation)
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    kept = data.draw(st.lists(st.sampled_from(spoken), min_size=1, unique=True))
    flagged = [{**m, "train": i in kept} if i in spoken else m for i, m in enumerate(messages)]
    alone = [{**m, "train": i == kept[0]} if i in spoken else m for i, m in enumerate(messages)]
    every, some, one = (masked(chatml, m).mask for m in (messages, flagged, alone))
    assert not (some & ~every).any()
    assert not (one & ~some).any()
    others = [{**m, "train": i not in kept} if i in spoken else m for i, m in enumerate(messages)]
    if len(kept) < len(spoken):
        rest = masked(chatml, others).mask
        assert not (rest & some).any()
        np.testing.assert_array_equal(rest | some, every)
