"""A wrong backend does not get past the check at the start; a right one does, and its error is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from document_batches import Run
from pegbox.errors import RunError
from pegbox_attention import checking
from pegbox_attention.backends import Borders, Masks, Rule, backend
from pegbox_attention.checking import Heads, check
from pegbox_attention.sinks.patching import held_to_plain_attention

CPU = torch.device("cpu")
SHAPES = {"full": Heads(8, 2, 16, None), "window": Heads(8, 2, 16, 128)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", ["pegbox", "eager"])
def test_right_backends_pass(name: Any, kind: Any, dtype: str) -> None:
    found = check(name, SHAPES[kind], CPU, dtype, deterministic=False)
    assert found.right
    assert found.allowed < 0.1


def a_token_more(rule: Rule, borders: Borders) -> tuple[Rule, Borders]:
    return replace(rule, window=None if rule.window is None else rule.window + 1), borders


def no_window(rule: Rule, borders: Borders) -> tuple[Rule, Borders]:
    return replace(rule, window=None), borders


def one_document(rule: Rule, borders: Borders) -> tuple[Rule, Borders]:
    return rule, Borders(borders.cu_seqlens_S[[0, -1]], int(borders.cu_seqlens_S[-1]))


def other_scale(rule: Rule, borders: Borders) -> tuple[Rule, Borders]:
    return replace(rule, scale=rule.scale * 1.05), borders


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", [a_token_more, no_window, one_document, other_scale, "no sinks", "frozen sinks"])
def test_wrong_backends_are_found_out(fault: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(name: Any, masks: Masks) -> Any:
        right = backend("eager", masks)
        if name == "eager":
            return right

        def attend(q: Any, k: Any, v: Any, sinks: Any, borders: Borders, rule: Rule) -> Any:
            if fault == "no sinks":
                return right(q, k, v, None, borders, rule) + 0 * sinks.sum()
            if fault == "frozen sinks":
                return right(q, k, v, sinks.detach(), borders, rule) + 0 * sinks.sum()
            changed, cut = fault(rule, borders)
            return right(q, k, v, sinks, cut, changed)

        return attend

    monkeypatch.setattr(checking, "backend", faulty)
    with pytest.raises(RunError, match=r"'pegbox' fails its check on 8 heads of 16 on 2, a window of 128") as raised:
        held_to_plain_attention("window", "pegbox", SHAPES["window"], CPU, dtype, deterministic=False)
    assert "Set gpt-oss-attention.window_backend to flex or eager" in str(raised.value)


def test_results_that_are_no_numbers_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(name: Any, masks: Masks) -> Any:
        right = backend("eager", masks)
        return right if name == "eager" else lambda *inputs: right(*inputs) * float("nan")

    monkeypatch.setattr(checking, "backend", empty)
    assert not check("pegbox", SHAPES["full"], CPU, "fp32", deterministic=False).right


def test_a_backend_that_does_not_run_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: Any, masks: Masks) -> Any:
        def attend(*_: object) -> Any:
            raise RuntimeError("no kernel image is available\nmore")

        return backend("eager", masks) if name == "eager" else attend

    monkeypatch.setattr(checking, "backend", broken)
    with pytest.raises(RunError, match="it does not run: no kernel image is available"):
        held_to_plain_attention("full", "pegbox", SHAPES["full"], CPU, "fp32", deterministic=False)


def test_the_check_moves_nobodys_randomness(load: Callable[..., Run]) -> None:
    torch.manual_seed(5)
    load(None)
    without = torch.rand(3)
    torch.manual_seed(5)
    load({})
    assert torch.equal(torch.rand(3), without)


def test_backend_and_error_of_each_kind_of_layers_are_told(
    load: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pegbox"):
        run = load({"backend": "eager", "window_backend": "pegbox", "deterministic": True})
    said = [record.getMessage() for record in caplog.records if "attention of" in record.getMessage()]
    assert len(said) == 2
    assert any("1 window layers: pegbox, deterministic: 4 heads of 16 on 2, a window of 4; largest" in s for s in said)
    reasons = {entry["modules"][0]: entry["reason"] for entry in run.log.summary()}
    assert reasons["model.layers.1.self_attn"].startswith("eager, deterministic: 4 heads of 16 on 2, the whole row")


def test_the_plan_says_what_is_known_and_asks_for_no_gpu(load: Callable[..., Run]) -> None:
    from pegbox.plan import plan_model

    run = load({"window_backend": "pegbox"}, meta=True)
    run.log.undo()
    entries = {entry["modules"][0]: entry for entry in plan_model(run.ctx).patches}
    full, window = entries["model.layers.1.self_attn"], entries["model.layers.0.self_attn"]
    assert full["slot"] == window["slot"] == "attention"
    assert full["reason"].startswith("auto: flash-attn-4, else pegbox, else flex, else eager")
    assert window["reason"] == "pegbox: 4 heads of 16 on 2, a window of 4; checked when the run starts"


def test_one_document_makes_no_table_and_is_attended_as_with_one() -> None:
    pytest.importorskip("pegbox_kernels")
    masks, generator = Masks(), torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(5, 2, 16, generator=generator) for _ in range(3))
    attended = [
        backend(name, masks)(q, k, v, None, Borders(torch.tensor([0, 5], dtype=torch.int32), 5), Rule(0.25))
        for name in ("pegbox", "eager")
    ]
    torch.testing.assert_close(*attended)
    assert [key[0] for _, key, _ in masks._kept] == ["dense"]
