"""A folder that is not the trained model fails the check, whatever went wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from exported_runs import change
from pegbox.errors import RunError, UserError
from pegbox_merge.fidelity import _same_top, check, read_probes
from pegbox_merge.merging import Merged, MergeRequest, write_merged
from pegbox_merge.runs import Trained, open_run
from pegbox_merge.verdict import LIMITS, Figures
from safetensors.torch import load_file, save_file

Made = tuple[Trained, Merged]


@pytest.fixture
def made(bases: Callable, adapter_on: Callable, tmp_path: Path) -> Made:
    trained = open_run(adapter_on(bases("llama"), target_modules="all-linear"))
    return trained, write_merged(trained, MergeRequest(tmp_path / "merged"))


def status(done: Merged) -> str:
    return json.loads((done.folder / "merge.json").read_text())["status"]


def forget_one_adapter(made: Made) -> None:
    trained, done = made
    name = "model.layers.1.mlp.down_proj.weight"
    change(done.folder, name, lambda _: load_file(trained.base_files / "model.safetensors")[name])


def forget_all_adapters(made: Made) -> None:
    trained, done = made
    base = load_file(trained.base_files / "model.safetensors")
    save_file(base, done.folder / "model.safetensors", metadata={"format": "pt"})


def swap_rows(made: Made) -> None:
    change(made[1].folder, "model.layers.0.self_attn.q_proj.weight", lambda weight: weight.flip(0))


def other_template(made: Made) -> None:
    (made[1].folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")


def other_end(made: Made) -> None:
    file = made[1].folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": 9}))


def test_a_good_merge_is_marked_good(made: Made) -> None:
    trained, done = made
    assert status(done) == "unchecked"
    check(trained, done)
    assert status(done) == "checked"


@pytest.mark.parametrize("damage", [forget_one_adapter, forget_all_adapters, swap_rows, other_template, other_end])
def test_a_damaged_merge_is_caught_and_marked(damage: Callable[[Made], None], made: Made) -> None:
    damage(made)
    with pytest.raises(RunError, match="is not the one that was trained"):
        check(*made)
    record = json.loads((made[1].folder / "merge.json").read_text())
    assert record["status"] == "failed"
    assert record["check"]["problems"]


def test_a_small_adapter_that_was_forgotten_is_caught(bases: Callable, adapter_on: Callable, tmp_path: Path) -> None:
    run = adapter_on(bases("llama", torch.bfloat16), target_modules=["q_proj"], size=0.02)
    trained = open_run(run)
    done = write_merged(trained, MergeRequest(tmp_path / "merged"))
    assert check(trained, done).kl_base < 0.01
    forget_all_adapters((trained, done))
    with pytest.raises(RunError, match="more than a quarter of what training changed"):
        check(trained, done)


def test_tokens_that_change_places_by_rounding_logits_to_bfloat16_count_as_the_same() -> None:
    logits_TV = 16 + 16 * torch.rand(4000, 50, generator=torch.Generator().manual_seed(0))
    exact_TV, rounded_TV = (made.log_softmax(-1) for made in (logits_TV, logits_TV.bfloat16().float()))
    assert not torch.equal(exact_TV.argmax(-1), rounded_TV.argmax(-1))
    assert _same_top(exact_TV, rounded_TV, LIMITS["bfloat16"].near).all()


def test_figures_that_are_no_numbers_fail() -> None:
    nan = float("nan")
    assert Figures(nan, nan, nan, 10, True, True).problems("float32")


def test_probes_can_be_given(tmp_path: Path) -> None:
    file = tmp_path / "probes.txt"
    file.write_text("one\n\ntwo\n")
    assert read_probes(file) == ("one", "two")
    with pytest.raises(UserError, match="no file"):
        read_probes(tmp_path / "none.txt")
