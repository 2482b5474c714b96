"""Conversations with a model whose answers are known."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import yaml
from pegbox.errors import UserError
from pegbox_chat.command import chat
from pegbox_chat.dialogue import Dialogue
from pegbox_chat.runs import config_for
from pegbox_chat.speaker import Sampling, open_speaker, turn_end
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

Typed = Callable[[str], None]
GREEDY = Sampling(max_tokens=60, temperature=0, top_p=1)
HI, AGAIN, ALONE, SHORT = "Hello there, friend.", "Hello again to you.", "Nothing was said before.", "Yes."


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Typed:
    """What a person types, one message a line."""
    return lambda text: monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_shot_prints_the_answer_and_nothing_else(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chat(str(talker), message="Hi", temperature=0)
    assert capfd.readouterr() == (f"{HI}\n", "")


def test_a_system_message_comes_first(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chat(str(talker), message="Hi", system="Be short", temperature=0)
    assert capfd.readouterr().out == f"{SHORT}\n"


def test_a_conversation_remembers_and_forgets(talker: Path, typed: Typed, capfd: pytest.CaptureFixture[str]) -> None:
    typed("Hi\nAgain\n\n/reset\nAgain\n/system Be short\nHi\n/system\nHi\n/exit\nHi\n")
    chat(str(talker), temperature=0)
    assert capfd.readouterr().out.splitlines() == [HI, AGAIN, ALONE, SHORT, HI]


def test_the_end_of_input_ends_the_conversation(talker: Path, typed: Typed, capfd: pytest.CaptureFixture[str]) -> None:
    typed("Hi")
    chat(str(talker), temperature=0)
    assert capfd.readouterr().out == f"{HI}\n"


def test_an_unknown_command_lists_the_known_ones(talker: Path, typed: Typed, capfd: pytest.CaptureFixture[str]) -> None:
    typed("/rest\n/exit\n")
    chat(str(talker), temperature=0)
    out, err = capfd.readouterr()
    assert out == ""
    assert all(f"{command}" in err for command in ("/exit ", "/reset ", "/system TEXT"))


def test_answers_appear_piece_by_piece(talker: Path) -> None:
    pieces: list[str] = []
    answer = open_speaker(str(talker), GREEDY, None).answer([{"role": "user", "content": "Hi"}], pieces.append)
    assert "".join(pieces) == answer == HI
    assert len(pieces) >= 3


def test_an_answer_is_no_longer_than_asked(talker: Path) -> None:
    short = Sampling(max_tokens=2, temperature=0, top_p=1)
    speaker = open_speaker(str(talker), short, None)
    answer = speaker.answer([{"role": "user", "content": "Hi"}], lambda _: None)
    assert HI.startswith(answer)
    assert 0 < len(speaker.tokenizer(answer).input_ids) <= 2


def test_a_seed_makes_sampled_answers_repeatable(talker: Path) -> None:
    wild = Sampling(max_tokens=20, temperature=20.0, top_p=1)

    def say(seed: int) -> str:
        return open_speaker(str(talker), wild, seed).answer([{"role": "user", "content": "Hi"}], lambda _: None)

    assert say(1) == say(1) != say(2)


def test_stopping_an_answer_keeps_what_was_said(talker: Path, capfd: pytest.CaptureFixture[str]) -> None:
    speaker, pieces = open_speaker(str(talker), GREEDY, None), []

    def interrupt_after_two(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 2:
            raise KeyboardInterrupt

    answer = speaker.answer([{"role": "user", "content": "Hi"}], interrupt_after_two)
    assert HI.startswith(answer)
    assert answer == "".join(pieces).strip() != HI
    assert "[stopped]" in capfd.readouterr().err


def test_the_token_after_an_answer_is_found_in_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id


def test_without_a_template_the_text_goes_on(talker: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(talker, plain)
    (plain / "chat_template.jinja").unlink()
    chat(str(plain), message="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", temperature=0, max_tokens=20)
    out, err = capfd.readouterr()
    assert out.startswith(HI)
    assert "has no chat template" in err


def test_a_template_that_refuses_is_an_error_without_a_trace(talker: Path) -> None:
    speaker = open_speaker(str(talker), GREEDY, None)
    with pytest.raises(UserError, match="no tools here"):
        speaker.answer([{"role": "tool", "content": "42"}], lambda _: None)


def test_a_conversation_that_is_too_long_is_refused_and_not_remembered(
    talker: Path, typed: Typed, capfd: pytest.CaptureFixture[str]
) -> None:
    dialogue = Dialogue(open_speaker(str(talker), GREEDY, None))
    with pytest.raises(UserError, match="the model reads 160"):
        dialogue.ask("word " * 200)
    assert dialogue.said == []
    typed(f"{'word ' * 200}\nHi\n")
    chat(str(talker), temperature=0)
    out, err = capfd.readouterr()
    assert out == f"{HI}\n"
    assert "the model reads 160" in err


def run_folder(path: Path, **hf: object) -> Path:
    path.mkdir()
    (path / "run.json").write_text("{}")
    (path / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "x"}, "plugins": ["hf"], "hf": hf}))
    return path


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", {"architectures": ["LlamaForSequenceClassification"]}),
        ("adapter_config.json", {"task_type": "TOKEN_CLS"}),
    ],
)
def test_a_reward_model_does_not_talk(tmp_path: Path, file: str, said: dict[str, object]) -> None:
    (run_folder(tmp_path / "judge") / file).write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"judge gives numbers and no words"):
        config_for(str(tmp_path / "judge"))


def test_a_run_that_was_not_exported_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no model yet") as raised:
        chat(str(run_folder(tmp_path / "run")), message="Hi")
    assert "resume=auto" in raised.value.next


def test_an_exported_run_answers(talker: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    shutil.copytree(talker, run, dirs_exist_ok=True)
    chat(str(run), message="Hi", temperature=0)
    assert capfd.readouterr() == (f"{HI}\n", "")


def test_an_adapter_answers_as_peft_does(talker: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = run_folder(tmp_path / "run")
    torch.manual_seed(1)
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, r=2)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(talker), config).eval()
    adapted.save_pretrained(run)
    tokenizer = AutoTokenizer.from_pretrained(talker)
    tokenizer.save_pretrained(run)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = adapted.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=[0, 2], pad_token_id=0)
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.strip() != HI
    capfd.readouterr()
    chat(str(run), message="Hi", temperature=0, max_tokens=30)
    assert capfd.readouterr().out.strip() == expected.strip()


def test_only_a_run_that_trusted_code_trusts_it_in_conversation(tmp_path: Path) -> None:
    for name, hf, trusted in (
        ("plain", {}, []),
        ("trusting", {"trust_remote_code": ["owner/m"]}, ["owner/m", str(tmp_path / "trusting")]),
    ):
        run = run_folder(tmp_path / name, **hf)
        (run / "config.json").write_text(json.dumps({}))
        assert config_for(str(run))["hf"] == {"trust_remote_code": trusted}
    assert config_for("owner/m")["hf"] == {"trust_remote_code": []}


def test_a_model_that_does_not_exist_is_an_error_without_a_trace() -> None:
    with pytest.raises(UserError, match="does not exist"):
        chat("./no-such-folder", message="Hi")
