"""Answers to every row of a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox.errors import DataError, UserError
from pegbox_chat import answers as answers_module
from pegbox_chat.generate import generate
from pegbox_chat.opened import open_model
from pegbox_chat.sampling import Choice, processors
from pegbox_chat.speaker import Sampling, open_speaker
from transformers import AutoModelForCausalLM

HI, AGAIN, SHORT = "Hello there, friend.", "Hello again to you.", "Yes."
CHATS = [
    {"id": 7, "messages": [{"role": "user", "content": "Hi"}]},
    {
        "id": 8,
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": HI},
            {"role": "user", "content": "Again"},
        ],
    },
    {"id": 9, "messages": [{"role": "system", "content": "Be short"}, {"role": "user", "content": "Hi"}]},
    {"id": 10, "prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"},
    {"id": 11, "prompt": [{"role": "user", "content": "Hi"}]},
]
EXPECTED = [HI, AGAIN, SHORT, HI, HI]


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(talker: Path, folder: Path, rows: Sequence[object] = CHATS, name: str = "out.jsonl", **options: Any) -> list:
    generate(str(talker), write(folder / "in.jsonl", rows), folder / name, **{"max_tokens": 40, **options})
    return read(folder / name)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_answers_stand_in_the_inputs_order_whatever_the_batch(batch: int, talker: Path, tmp_path: Path) -> None:
    rows = run(talker, tmp_path, batch=batch)
    assert [row["completion"] for row in rows] == EXPECTED
    assert [{key: row[key] for key in row if not key.startswith("completion")} for row in rows] == CHATS
    assert {row["completion_finish"] for row in rows} == {"stop"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_row_is_answered_as_in_a_conversation(talker: Path, tmp_path: Path) -> None:
    speaker = open_speaker(str(talker), Sampling(max_tokens=40, temperature=0, top_p=1), None)
    alone = [speaker.answer(row["messages"], lambda _: None) for row in CHATS[:3]]
    assert [row["completion"].strip() for row in run(talker, tmp_path)[:3]] == alone


def test_an_answer_that_is_cut_says_so(talker: Path, tmp_path: Path) -> None:
    row = run(talker, tmp_path, CHATS[:1], max_tokens=2)[0]
    assert HI.startswith(row["completion"])
    assert (row["completion_tokens"], row["completion_finish"]) == (2, "length")


def test_a_sampled_answer_depends_on_its_row_and_the_seed_alone(talker: Path, tmp_path: Path) -> None:
    def sampled(name: str, **options: Any) -> list[str]:
        rows = run(talker, tmp_path, [CHATS[0]] * 5, name, temperature=3.0, **options)
        return [row["completion"] for row in rows]

    one = sampled("a", batch=1)
    assert one == sampled("b", batch=2) == sampled("c", batch=5)
    assert len(set(one)) > 1, "rows have their own noise"
    assert one != sampled("d", batch=5, seed=1)


@pytest.mark.parametrize(
    "choice",
    [Choice(9, temperature=1.0), Choice(9, temperature=0.5), Choice(9, 1.0, top_k=2), Choice(9, 1.0, top_p=0.7)],
)
def test_sampled_tokens_have_the_probabilities_of_the_softmax(choice: Choice) -> None:
    logits, draws = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), 4000
    ids_BT, scores_BV = torch.zeros(draws, 3, dtype=torch.long), logits.expand(draws, 4)
    chain = processors(choice, range(draws), prompt_tokens=3)
    for step in chain[:-1]:
        scores_BV = step(ids_BT, scores_BV)
    expected = scores_BV[0].softmax(0)
    chosen = chain[-1](ids_BT, scores_BV).argmax(-1)
    seen = torch.bincount(chosen, minlength=4) / draws
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.03)


def test_a_system_message_is_added_where_there_is_none(talker: Path, tmp_path: Path) -> None:
    assert [row["completion"] for row in run(talker, tmp_path, [CHATS[0], CHATS[2]], system="Be short")] == [SHORT] * 2


def test_rows_of_training_data_can_be_asked_again(talker: Path, tmp_path: Path) -> None:
    told = {"messages": [*CHATS[0]["messages"], {"role": "assistant", "content": "Wrong."}]}
    assert run(talker, tmp_path, [told], drop_answer=True, field="again")[0]["again"] == HI


def test_an_output_that_exists_is_kept(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(UserError, match="exists"):
        run(talker, tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "precious"
    assert [row["completion"] for row in run(talker, tmp_path, overwrite=True)] == EXPECTED


class Interrupted(Exception):
    """Ends a generation in the middle."""


def interrupted(talker: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Generate in batches of one row, fail after some; returns the rows that were generated."""
    done: list[int] = []
    own = answers_module._answer

    def fail_later(model: Any, batch: Any, choice: Any) -> Any:
        if len(done) == after:
            raise Interrupted
        done.extend(prompt.index for prompt in batch)
        return own(model, batch, choice)

    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "_answer", fail_later)
        with pytest.raises(Interrupted):
            run(talker, folder, batch=1)
    return done


def test_an_interrupted_generation_goes_on_where_it_stopped(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = interrupted(talker, tmp_path, monkeypatch, after=3)
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match="generation that did not end"):
        run(talker, tmp_path)
    unfinished = tmp_path / "out.jsonl.unfinished"
    unfinished.write_text(unfinished.read_text() + '{"index": 0, "te')
    again: list[int] = []
    own = answers_module._answer

    def seen(model: Any, batch: Any, choice: Any) -> Any:
        again.extend(prompt.index for prompt in batch)
        return own(model, batch, choice)

    monkeypatch.setattr(answers_module, "_answer", seen)
    assert [row["completion"] for row in run(talker, tmp_path, resume=True)] == EXPECTED
    assert sorted([*done, *again]) == [0, 1, 2, 3, 4]
    assert not unfinished.exists()


def test_answers_of_two_kinds_are_not_mixed(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(talker, tmp_path, monkeypatch, after=2)
    for change in ({"temperature": 0.5}, {"rows": CHATS[:4]}):
        with pytest.raises(UserError, match="made from another input"):
            run(talker, tmp_path, resume=True, **change)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", r"in\.jsonl:2 is no JSON"),
        ({"text": "x"}, r"in\.jsonl:2 holds text"),
        ({"messages": [], "prompt": "x"}, "and not one of messages and prompt"),
        ({"messages": []}, "conversation is empty"),
        ({"messages": 3}, "no list of messages"),
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]}, "--drop-answer"),
        ({"messages": [{"role": "tool", "content": "42"}, {"role": "user", "content": "x"}]}, "no tools here"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "word " * 100}, "more than the 160"),
        ({"prompt": "x", "completion": "y"}, "has a field 'completion' already"),
    ],
)
def test_a_wrong_row_is_named_before_any_is_answered(row: object, says: str, talker: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=says) as raised:
        run(talker, tmp_path, [CHATS[0], row])
    assert "in.jsonl:2" in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_input_without_rows_is_refused(talker: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no rows"):
        run(talker, tmp_path, [])
    with pytest.raises(DataError, match="there is no file"):
        generate(str(talker), tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="there is no folder"):
        generate(str(talker), tmp_path / "in.jsonl", tmp_path / "none" / "out.jsonl")


def test_conversations_need_a_template(talker: Path, tmp_path: Path) -> None:
    from shutil import copytree

    copytree(talker, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="has no chat template"):
        run(tmp_path / "plain", tmp_path)
    assert run(tmp_path / "plain", tmp_path, CHATS[3:4], max_tokens=20)[0]["completion"].startswith(HI)


def test_an_adapter_and_its_merged_model_answer_alike(talker: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, r=2)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(talker), config)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer = open_model(str(talker)).tokenizer
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    told = [run(tmp_path / name, tmp_path, name=f"{name}.jsonl") for name in ("adapter", "merged")]
    assert told[0] == told[1]
    assert [row["completion"] for row in told[0]] != EXPECTED


def test_what_shaped_the_base_of_an_adapter_is_asked_for_again(tmp_path: Path) -> None:
    from pegbox_chat.runs import config_for

    section = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention": "eager"}
    for kind, expected in (("adapter_config.json", {"rope_scaling": section["rope_scaling"]}), ("config.json", {})):
        folder = tmp_path / kind
        folder.mkdir()
        write(folder / "run.json", ["{}"])
        write(folder / "config.yaml", [json.dumps({"hf": section})])
        write(folder / kind, ["{}"])
        assert config_for(str(folder))["hf"] == {"trust_remote_code": [], **expected}
