"""Scores are those of plain transformers on the same folder and text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.events import RunBegins, RunStarted
from pegbox.rollouts import Rollout
from pegbox.types import Job
from tiny_judges import OPENS, OTHER_TEMPLATE, judge, tokenizer_of
from transformers import PreTrainedTokenizerFast

Ask = Callable[..., Any]
MESSAGES = [{"role": "user", "content": "one and two?"}]
ANSWERS = ["three", "it is four", "three and one is four, so it is three"]


def rollout(own: PreTrainedTokenizerFast, answer: str, finished: bool = True, **columns: Any) -> Rollout:
    prompt = own("one and two?")["input_ids"]
    completion = own(answer)["input_ids"] + [own.eos_token_id] * finished
    logps = (-1.0,) * len(completion)
    versions = {"first_version": 0, "last_version": 0}
    return Rollout(
        prompt=tuple(prompt), completion=tuple(completion), logps=logps, finished=finished, columns=columns, **versions
    )


def reference(folder: Path, ids: list[int], kind: str = "outcome") -> torch.Tensor:
    """What transformers predicts for one text alone."""
    with torch.no_grad():
        return OPENS[kind].from_pretrained(folder).eval()(torch.tensor([ids])).logits[0]


def expect(scores: Any, folder: Path, texts: list[list[int]]) -> None:
    expected = [reference(folder, ids).item() for ids in texts]
    assert max(expected) - min(expected) > 0.05
    assert scores.values_R == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_tokens_are_read_as_they_are_where_the_vocabulary_is_the_same(
    scores: Ask, helpful: Path, own: PreTrainedTokenizerFast
) -> None:
    rollouts = [rollout(own, answer, finished=answer != "it is four") for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(helpful)})
    assert score.name == "reward-model/helpful"
    expect(score, helpful, [[*one.prompt, *one.completion] for one in rollouts])


def test_a_conversation_is_rendered_with_the_models_own_template(
    scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    folder = judge(tmp_path / "judge")
    tokenizer = tokenizer_of("an entirely different corpus with its own pieces", OTHER_TEMPLATE)
    tokenizer.save_pretrained(folder)
    assert tokenizer("one and two")["input_ids"] != own("one and two")["input_ids"]
    rollouts = [rollout(own, answer, prompt=MESSAGES) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(folder)})
    chats = [[*MESSAGES, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    expect(score, folder, [tokenizer.apply_chat_template(chat, return_dict=False) for chat in chats])
    known = [{**one, "content": one["content"]} for one in chats[0]]
    (other,) = scores([rollout(own, ANSWERS[0], talk=known)], {"name": str(folder)}, prompt="talk")
    assert other.values_R == pytest.approx(score.values_R[:1], rel=1e-4)


def test_names_of_scores_are_told_without_completions_and_without_a_model(scores: Ask) -> None:
    """A weight for a name that nobody gives can then be refused before any model is loaded."""
    told = scores([], {"name": "runs/absent"}, {"name": "runs/other", "score": "right"})
    assert [(one.name, one.values_R) for one in told] == [("reward-model/absent", ()), ("reward-model/right", ())]


def test_an_answer_that_was_cut_off_is_scored_where_it_was_cut(
    scores: Ask, helpful: Path, own: PreTrainedTokenizerFast
) -> None:
    rollouts = [rollout(own, answer, finished=False, prompt=MESSAGES) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(helpful)})
    chats = [[*MESSAGES, {"role": "assistant", "content": answer}] for answer in ANSWERS]
    ids = [own.apply_chat_template(chat, continue_final_message=True, return_dict=False) for chat in chats]
    expect(score, helpful, ids)
    (whole,) = scores([rollout(own, answer, prompt=MESSAGES) for answer in ANSWERS], {"name": str(helpful)})
    assert whole.values_R != pytest.approx(score.values_R, rel=1e-3)


def test_a_conversation_that_came_as_tokens_ends_as_its_template_ends_turns(
    scores: Ask, helpful: Path, own: PreTrainedTokenizerFast
) -> None:
    """The line break behind the end token is read, with or without messages; not where the answer was cut off."""
    prompt = tuple(own.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False))
    tokens = [replace(rollout(own, answer), prompt=prompt) for answer in ANSWERS]
    (score,) = scores(tokens, {"name": str(helpful)})
    (same,) = scores([rollout(own, answer, prompt=MESSAGES) for answer in ANSWERS], {"name": str(helpful)})
    assert score.values_R == pytest.approx(same.values_R, rel=1e-4)
    expect(score, helpful, [[*prompt, *one.completion, *own("\n")["input_ids"]] for one in tokens])
    cut = [replace(one, completion=one.completion[:-1], finished=False) for one in tokens]
    (short,) = scores(cut, {"name": str(helpful)})
    expect(short, helpful, [[*prompt, *one.completion] for one in cut])


def test_plain_text_goes_to_another_tokenizer_with_its_end_token(
    scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    folder = judge(tmp_path / "judge")
    tokenizer = tokenizer_of("an entirely different corpus with its own pieces", None)
    tokenizer.save_pretrained(folder)
    rollouts = [rollout(own, answer, finished=answer != "it is four", prompt=MESSAGES) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(folder)})
    texts = [tokenizer(f"one and two?{answer}")["input_ids"] for answer in ANSWERS]
    ends = [[tokenizer.eos_token_id] * one.finished for one in rollouts]
    expect(score, folder, [text + end for text, end in zip(texts, ends, strict=True)])


def test_padding_is_left_out_as_transformers_leaves_it_out(
    scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    """A model whose end token pads: transformers scores the token before it."""
    folder = judge(tmp_path / "judge", pad_token_id=own.eos_token_id)
    own.save_pretrained(folder)
    rollouts = [rollout(own, answer) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(folder)})
    expect(score, folder, [[*one.prompt, *one.completion] for one in rollouts])


def test_scores_depend_neither_on_neighbours_nor_on_how_many_there_are(
    scores: Ask, helpful: Path, own: PreTrainedTokenizerFast
) -> None:
    rollouts = [rollout(own, answer) for answer in [*ANSWERS, *ANSWERS, "x"]]
    (together,) = scores(rollouts, {"name": str(helpful)})
    (apart,) = scores(rollouts, {"name": str(helpful)}, micro_batch=1)
    assert together.values_R[:3] == together.values_R[3:6]
    assert apart.values_R == pytest.approx(together.values_R, rel=1e-4, abs=1e-5)


def test_longer_texts_lose_their_beginning(scores: Ask, helpful: Path, own: PreTrainedTokenizerFast) -> None:
    rollouts = [rollout(own, answer) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(helpful), "max_length": 4})
    expect(score, helpful, [[*one.prompt, *one.completion][-4:] for one in rollouts])


@pytest.mark.parametrize("steps", ["min", "mean", "last", "product"])
def test_steps_are_judged_at_their_separators(
    steps: str, scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    folder = judge(tmp_path / "judge", "process")
    own.save_pretrained(folder)
    answers = ["one\ntwo and one\nthree", "four\n\n", "four and four", ""]
    rollouts = [rollout(own, answer, finished=answer != "four and four") for answer in answers]
    (score,) = scores(rollouts, {"name": str(folder), "kind": "process", "steps": steps, "score": "right"})
    assert score.name == "reward-model/right"
    assert score.values_R[3] is None
    between = own("\n")["input_ids"]
    for answer, value in zip(answers[:3], score.values_R, strict=False):
        ids, places = own("one and two?")["input_ids"], []
        for step in filter(None, answer.split("\n")):
            ids = [*ids, *own(step)["input_ids"], *between]
            places.append(len(ids) - 1)
        right = reference(folder, ids, "process").softmax(-1)[places, 1]
        expected = {"min": right.min(), "mean": right.mean(), "last": right[-1], "product": right.prod()}[steps]
        assert value == pytest.approx(expected.item(), rel=1e-4)


def test_steps_of_a_conversation_follow_its_generation_prompt(
    scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    folder = judge(tmp_path / "judge", "process")
    own.save_pretrained(folder)
    (score,) = scores([rollout(own, "three", prompt=MESSAGES)], {"name": str(folder), "kind": "process", "label": 0})
    ids = own.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    ids = [*ids, *own("three")["input_ids"], *own("\n")["input_ids"]]
    expected = reference(folder, ids, "process").softmax(-1)[-1, 0].item()
    assert score.values_R == pytest.approx((expected,), rel=1e-4)


def test_an_adapter_with_its_head_is_a_reward_model(
    scores: Ask, helpful: Path, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    base = OPENS["outcome"].from_pretrained(helpful)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        asked = peft.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False, target_modules=["v_proj"])
        adapted = peft.get_peft_model(base, asked).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    own.save_pretrained(tmp_path / "adapter")
    rollouts = [rollout(own, answer) for answer in ANSWERS]
    (score,) = scores(rollouts, {"name": str(tmp_path / "adapter")})
    with torch.no_grad():
        expected = [adapted(torch.tensor([[*one.prompt, *one.completion]])).logits.item() for one in rollouts]
    assert score.values_R == pytest.approx(expected, rel=1e-4, abs=1e-5)
    (bare,) = scores(rollouts, {"name": str(helpful)})
    assert bare.values_R != pytest.approx(expected, rel=1e-2)


def test_several_models_have_scores_of_their_own(scores: Ask, helpful: Path, own: PreTrainedTokenizerFast) -> None:
    own.save_pretrained(judge(helpful.parent / "safe", seed=1))
    rollouts = [rollout(own, answer) for answer in ANSWERS]
    one, two = scores(rollouts, {"name": str(helpful)}, {"name": str(helpful.parent / "safe")})
    assert (one.name, two.name) == ("reward-model/helpful", "reward-model/safe")
    assert one.values_R != two.values_R


def test_models_are_frozen_and_opened_once_when_the_run_starts(
    context: Ask, helpful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = context({"name": str(helpful)})
    opened = []
    whole = ctx.open_model
    monkeypatch.setattr(ctx, "open_model", lambda *asked: opened.append(whole(*asked)) or opened[-1])
    plugin, begun = ctx.kernel.active["reward-model"].instance, RunStarted(job=Job.__new__(Job), step=0)
    plugin.on_event(ctx, begun)
    plugin.on_event(ctx, begun)
    assert len(opened) == 1
    assert opened[0].role == "reward"
    assert not any(parameter.requires_grad for parameter in opened[0].module.parameters())
    assert not opened[0].module.training


def test_a_folder_that_is_not_there_stops_the_run_before_anything_is_read(context: Ask) -> None:
    ctx = context({"name": "./nowhere"})
    with pytest.raises(ConfigError, match=r"reward-model\.models names './nowhere', but .* is no folder"):
        ctx.notify(RunBegins())


def test_a_name_that_leads_nowhere_is_told_with_what_is_near(
    context: Ask, helpful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(helpful.parent.parent)
    ctx = context({"name": f"{helpful.parent.name}/helpfull"})
    with pytest.raises(UserError, match=r"(?s)helpfull' is no folder, and the hub does not give it.*mean 'helpful'"):
        ctx.notify(RunBegins())


@pytest.mark.parametrize(
    ("kind", "other", "says"), [("process", "outcome", "of the kind process"), ("outcome", "process", "kind outcome")]
)
def test_a_folder_of_another_kind_is_refused_before_anything_is_loaded(
    context: Ask, tmp_path: Path, kind: Any, other: str, says: str
) -> None:
    folder = judge(tmp_path / "judge", kind)
    context({"name": str(folder), "kind": kind}).notify(RunBegins())
    with pytest.raises(ConfigError, match=f"(?s){says}.*Set kind: {kind}"):
        context({"name": str(folder), "kind": other}).notify(RunBegins())


def test_a_language_model_is_refused_before_anything_is_loaded(context: Ask, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is a language model"):
        context({"name": str(tmp_path)}).notify(RunBegins())


def test_a_language_model_is_no_reward_model(scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "policy")
    own.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="has no head that was trained"):
        scores([rollout(own, "three")], {"name": str(tmp_path / "policy")})


def test_a_folder_without_a_tokenizer_is_refused(scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast) -> None:
    judge(tmp_path / "bare")
    with pytest.raises(UserError, match=r"the tokenizer of the reward model .* does not open"):
        scores([rollout(own, "three")], {"name": str(tmp_path / "bare")})


def test_a_template_that_refuses_a_conversation_is_named(
    scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast
) -> None:
    tokenizer_of("other pieces", OTHER_TEMPLATE).save_pretrained(judge(tmp_path / "judge"))
    talk = [{"role": "system", "content": "be kind"}, *MESSAGES]
    with pytest.raises(RunError, match="refuses a conversation: no system turns") as raised:
        scores([rollout(own, "three", prompt=talk)], {"name": str(tmp_path / "judge")})
    assert "system, user, assistant" in raised.value.why


def test_a_separator_of_several_tokens_is_refused(scores: Ask, tmp_path: Path, own: PreTrainedTokenizerFast) -> None:
    own.save_pretrained(judge(tmp_path / "judge", "process"))
    entry = {"name": str(tmp_path / "judge"), "kind": "process", "step_separator": "~~~"}
    with pytest.raises(ConfigError, match="step_separator '~~~' makes 3 tokens"):
        scores([rollout(own, "three")], entry)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ([{"name": "a/x"}, {"name": "b/x"}], "two models have the score reward-model/x"),
        ([{"name": "x", "steps": "mean"}], "steps is set, but kind is outcome"),
        ([], "at least 1"),
    ],
)
def test_sections_that_contradict_themselves_are_refused(models: list[Any], says: str, context: Ask) -> None:
    with pytest.raises(ConfigError, match=says):
        context(*models)
