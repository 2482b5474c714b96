"""With the plugin, loss and gradients are those of transformers' eager attention, on padded and on packed rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from document_batches import Run, batch_of, outcome
from pegbox.rows import Batch

Load = Callable[..., Run]
PADDED = batch_of([[13], [7], [2]])
PACKED = batch_of([[5, 9, 1, 1], [8, 1, 4, 3]])
BATCHES = {"padded": PADDED, "packed": PACKED, "one token": batch_of([[2], [1]])}


def assert_equal(got: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("backends", [("pegbox", "pegbox"), ("eager", "pegbox"), ("eager", "eager")])
@pytest.mark.parametrize("rows", BATCHES)
def test_loss_and_all_gradients_are_those_of_eager_attention(rows: str, backends: tuple[str, str], load: Load) -> None:
    section = {"backend": backends[0], "window_backend": backends[1]}
    run = load(section)
    expected = outcome(load(None, hf={"attention": "eager"}).model, BATCHES[rows])
    assert_equal(outcome(run.model, BATCHES[rows]), expected)
    assert any(name.endswith("sinks") and gradient.abs().max() > 1e-4 for name, gradient in expected[1].items()) or (
        rows == "one token"
    )
    run.log.verify()


def test_packed_documents_are_computed_as_if_they_were_alone(load: Load) -> None:
    model = load({"backend": "pegbox"}).model
    alone = [[length] for length in (5, 9, 1, 1, 8, 1, 4, 3)]
    separate = batch_of(alone)
    assert torch.equal(separate.targets_BT[separate.targets_BT >= 0], PACKED.targets_BT[PACKED.targets_BT >= 0])
    assert_equal(outcome(model, PACKED), outcome(model, separate))


def test_gradient_checkpointing_changes_nothing(load: Load) -> None:
    expected = outcome(load({"backend": "pegbox"}).model, PACKED)
    assert_equal(outcome(load({"backend": "pegbox"}, "activations").model, PACKED), expected)


def test_adapters_on_attention_are_trained_the_same(load: Load) -> None:
    lora = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "init": "gaussian"}
    torch.manual_seed(1)
    run = load({"backend": "pegbox"}, "lora", lora=lora)
    torch.manual_seed(1)
    eager = load(None, "lora", lora=lora, hf={"attention": "eager"})
    for one, other in zip(run.model.module.parameters(), eager.model.module.parameters(), strict=True):
        if one.requires_grad:
            one.data.add_(0.05)
            other.data.copy_(one.data)
    expected = outcome(eager.model, PACKED)
    assert_equal(outcome(run.model, PACKED), expected)
    assert expected[1]
    run.log.verify()


def test_undone_the_model_is_the_eager_one_to_the_bit(load: Load) -> None:
    run = load({"backend": "pegbox"})
    outcome(run.model, PACKED)
    run.log.undo()
    assert run.model.module.config._attn_implementation == "eager"
    eager = load(None, hf={"attention": "eager"}).model
    for batch in (PADDED, PACKED):
        assert torch.equal(outcome(run.model, batch)[0], outcome(eager, batch)[0])


def test_no_mask_is_made_in_training(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        "transformers.masking_utils.sdpa_mask", lambda *a, **k: made.append(k) or pytest.fail("a mask was made")
    )
    model = load({"backend": "pegbox"}).model
    name = model.module.config._attn_implementation
    from transformers import AttentionMaskInterface

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, lambda *a, **k: made.append(k))
    for batch in (PADDED, PACKED):
        outcome(model, batch)
    assert made == []


def test_what_is_beyond_the_window_is_not_seen(load: Load) -> None:
    """Two window layers of 4 reach 6 tokens back, so the last of 12 does not move with the first."""
    model = load({"backend": "pegbox"}).model
    layer = model.module.model.layers[1].self_attn
    layer.layer_type, layer.sliding_window = "sliding_attention", 4
    model.module.config.layer_types[1] = "sliding_attention"
    batch = batch_of([[12]])

    def last(ids_BT: torch.Tensor) -> torch.Tensor:
        from dataclasses import replace

        moved: Batch = replace(batch, input_ids_BT=ids_BT)
        with torch.no_grad():
            return model.compute(model.module, moved, frozenset({"hidden"})).hidden_BTH[0, -1]

    before = last(batch.input_ids_BT)
    for at, reached in ((0, False), (4, False), (5, True), (11, True)):
        ids_BT = batch.input_ids_BT.clone()
        ids_BT[0, at] = (ids_BT[0, at] + 7) % 250
        assert (not torch.equal(last(ids_BT), before)) == reached
