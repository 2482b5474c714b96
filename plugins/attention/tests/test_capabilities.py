"""What an implementation cannot do is an error that names those that can, before weights are read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from document_batches import Run, batch_of, outcome
from pegbox.errors import ConfigError, PegboxError, PluginError, RunError
from pegbox.events import RunBegins
from pegbox.plan import compose, plan_model
from pegbox.testing import FakeRuntime
from pegbox_attention.capabilities import CAPABILITIES, Asked, Place, problems, require

Load = Callable[..., Run]
PLAIN = Asked(
    model="m",
    head_dim=128,
    window=None,
    sinks=False,
    softcap=False,
    masked="",
    dropout=0.0,
    interface=True,
    dtype="bf16",
)
HOPPER = Place("sm_90", "bf16")
EVERYWHERE = {"eager", "sdpa", "flex", "flash-attn-4", "pegbox"}


@pytest.mark.parametrize(
    ("asked", "place", "deterministic", "able"),
    [
        ({}, HOPPER, False, EVERYWHERE),
        ({"window": 128}, HOPPER, False, EVERYWHERE),
        ({"sinks": True}, HOPPER, False, EVERYWHERE - {"sdpa"}),
        ({"softcap": True}, HOPPER, False, {"eager", "flex", "flash-attn-4"}),
        ({"masked": "attends in chunks"}, HOPPER, False, {"eager", "sdpa"}),
        ({"dropout": 0.1}, HOPPER, False, {"eager", "sdpa"}),
        ({"head_dim": 256}, HOPPER, False, EVERYWHERE - {"flash-attn-4"}),
        ({"head_dim": 512}, HOPPER, False, {"eager", "sdpa"}),
        ({"head_dim": 100}, HOPPER, False, EVERYWHERE - {"flash-attn-4"}),
        ({"interface": False}, HOPPER, False, {"eager", "sdpa"}),
        ({}, HOPPER, True, EVERYWHERE - {"sdpa"}),
        ({}, Place("sm_90", "fp32"), False, EVERYWHERE - {"flash-attn-4"}),
        ({}, Place("sm_90", "fp64"), False, {"eager", "sdpa"}),
        ({}, Place("sm_100", "fp16"), False, EVERYWHERE),
        ({}, Place("sm_120", "bf16"), False, EVERYWHERE - {"flash-attn-4"}),
        ({}, Place("sm_80", "bf16"), False, EVERYWHERE - {"flash-attn-4"}),
        ({}, Place("amd", "bf16"), False, EVERYWHERE - {"flash-attn-4"}),
        ({}, Place("sm_75", "fp16"), False, {"eager", "sdpa"}),
        ({}, Place("cpu", "fp32"), False, {"eager", "sdpa", "pegbox"}),
        ({"sinks": True, "window": 128}, Place("cpu", "fp32"), True, {"eager", "pegbox"}),
        ({"sinks": True, "head_dim": 256}, None, False, {"eager", "flex", "pegbox"}),
    ],
)
def test_what_can_serve(asked: dict[str, Any], place: Place | None, deterministic: bool, able: set[str]) -> None:
    wanted = replace(PLAIN, **asked)
    found = {name for name, one in CAPABILITIES.items() if not list(problems(one, wanted, place, deterministic))}
    assert found == able
    for name in CAPABILITIES.keys() - able:
        with pytest.raises(ConfigError, match=f"attention.implementation is '{name}', which cannot serve") as raised:
            require(name, wanted, place, deterministic=deterministic)
        offered = raised.value.next.rpartition(": ")[2].rstrip(".").split(", ")
        assert set(offered) == able


@pytest.mark.parametrize(
    ("family", "section", "says"),
    [
        ("gemma2", {"implementation": "sdpa"}, "caps its attention logits"),
        ("gemma2", {"implementation": "pegbox"}, r"caps its attention logits(.|\n)*one that can: eager, flex, flash"),
        ("gpt_oss", {"implementation": "sdpa"}, "has attention sinks"),
        ("deepseek_v3", {"implementation": "pegbox"}, "has keys of another size than its values"),
        ("llama", {"implementation": "sdpa", "deterministic": True}, "does not give the same bits"),
        ("llama", {"implementation": "flash_attention_2", "deterministic": True}, "nothing is known about the bits"),
        ("llama", {"implementation": "flash-attn-5"}, r"attention.implementation(.|\n)*Did you mean 'flash-attn-4'"),
    ],
)
def test_what_the_model_asks_is_looked_at_before_weights_are_read(
    family: str, section: dict[str, Any], says: str, folder: Callable[..., Path], tmp_path: Path
) -> None:
    shape = tmp_path / "shape"
    shape.mkdir()
    shutil.copy(folder(family) / "config.json", shape)
    ctx = compose({"model": {"name": str(shape)}, "plugins": ["hf", "attention"], "attention": section})
    for look in (lambda: ctx.notify(RunBegins()), lambda: plan_model(ctx)):
        with pytest.raises(ConfigError, match=says):
            look()


def test_what_the_device_asks_is_looked_at_as_soon_as_there_is_one(load: Load) -> None:
    with pytest.raises(
        ConfigError, match=r"it does not train on cpu(.|\n)*one that can: eager, sdpa, pegbox"
    ) as raised:
        load("llama", "flex")
    (note,) = raised.value.__notes__
    assert "'attention'" in note
    assert "hook configure_model" in note


def test_a_gpu_is_not_asked_for_by_a_plan(load: Load) -> None:
    for implementation, says in (
        ("flash-attn-4", "flash-attn-4: documents by their borders, no masks"),
        ("flex", "flex: documents by their borders, no masks"),
        ("sdpa", "sdpa: documents by masks"),
    ):
        run = load("llama", implementation, meta=True)
        run.log.undo()
        (entry,) = plan_model(run.ctx).patches
        assert (entry["plugin"], entry["slot"], entry["reason"]) == ("attention", "attention", says)
        assert len(entry["modules"]) == 2


def test_what_is_not_installed_is_an_error_before_anything_is_read(load: Load) -> None:
    from importlib.util import find_spec

    if find_spec("flash_attn") is not None:
        pytest.skip("it is installed")
    run = load("llama", "flash-attn-4", meta=True)
    with pytest.raises(ConfigError, match=r"flash_attn\.cute is not installed"):
        run.ctx.notify(RunBegins())


def test_other_names_go_to_transformers_as_they_are_and_are_shown_as_unproven(load: Load) -> None:
    run = load("llama", "flex_attention", meta=True)
    assert run.model.module.config._attn_implementation == "flex_attention"
    (entry,) = run.log.summary()
    assert entry["reason"] == "flex_attention, unproven here: transformers gets the name as it stands"


def test_a_name_that_nobody_knows_is_an_error(load: Load) -> None:
    with pytest.raises(
        PegboxError, match=r"attention.implementation is 'flash_atention_2'(.|\n)*Did you mean 'flash_attention_2'"
    ):
        load("llama", "flash_atention_2", meta=True)


def test_two_values_for_attention_are_an_error_that_names_both_plugins(load: Load) -> None:
    with pytest.raises(PluginError, match=r"(?s)hf.*attention"):
        load("llama", "pegbox", hf={"attention": "sdpa"})
    load("llama", "sdpa", hf={"attention": "sdpa"})


def test_a_second_model_with_another_attention_is_left_alone(load: Load, folder: Callable[..., Path]) -> None:
    from pegbox import hooks
    from pegbox.types import ModelOptions, ModelRequest

    ctx = load("llama", "pegbox").ctx
    name = str(folder("llama"))
    for asked, patched in (("eager", False), ("pegbox_triton", True)):
        options = ModelOptions(attention=asked)
        request = ModelRequest(name=name, format="transformers", role="reference", options=options)
        model = ctx.call(hooks.load_model, ctx, request)
        assert bool(ctx.each(hooks.patch_attention, ctx, model)[0][1]) is patched


def test_deterministic_is_shown_and_is_an_implementation_of_its_own(load: Load) -> None:
    run = load("llama", {"implementation": "pegbox", "deterministic": True})
    assert run.model.module.config._attn_implementation == "pegbox_triton_deterministic"
    assert "no masks, deterministic; largest error" in run.log.summary()[0]["reason"]
    outcome(run.model, batch_of([[5, 4]]))
    run.log.verify()


def test_arithmetic_that_an_implementation_lacks_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    from pegbox_attention import capabilities

    class Hopper(FakeRuntime):
        precision = "fp32"

    monkeypatch.setattr(capabilities, "generation", lambda device: "sm_90")
    monkeypatch.setattr(capabilities, "absent", lambda name: "")
    with pytest.raises(ConfigError, match="the arithmetic is fp32, and it takes bf16 and fp16"):
        load("llama", "flash-attn-4", runtime=Hopper)


def test_what_is_brought_here_is_held_to_plain_attention_when_a_run_starts(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pegbox_attention import backends, checking

    shapes: list[Any] = []
    check = checking.check
    monkeypatch.setattr(
        checking, "check", lambda name, heads, *a, **k: shapes.append(heads) or check(name, heads, *a, **k)
    )
    load("gpt_oss", "pegbox")
    assert {(one.window, one.sinks) for one in shapes} == {(4, True), (None, True)}
    monkeypatch.setattr(checking, "check", check)
    right = backends.backend

    def faulty(name: Any, masks: Any) -> Any:
        attend = right("eager", masks)
        return attend if name == "eager" else lambda *inputs: attend(*inputs) * 1.01

    monkeypatch.setattr(checking, "backend", faulty)
    with pytest.raises(RunError, match=r"'pegbox' fails its check on 4 heads of 16 on 2, the whole row: largest error"):
        load("llama", "pegbox")
