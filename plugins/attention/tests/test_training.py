"""With any implementation, loss and gradients are those of transformers' eager attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from document_batches import Run, batch_of, outcome
from pegbox_attention import backends
from pegbox_attention.maskless import MasklessAttention

Load = Callable[..., Run]
PADDED = batch_of([[13], [7], [2]])
PACKED = batch_of([[5, 9, 1, 1], [8, 1, 4, 3]])
BATCHES = {"padded": PADDED, "packed": PACKED}
PROVEN = [
    *((family, name) for family in ("llama", "qwen3", "mistral") for name in ("pegbox", "sdpa", "eager")),
    ("gemma3_text", "pegbox"),
    ("gpt_oss", "pegbox"),
    ("gpt_oss", "eager"),
    ("gemma2", "eager"),
]


def assert_equal(got: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("family", "implementation"), PROVEN)
def test_loss_and_all_gradients_are_those_of_eager_attention(family: str, implementation: str, load: Load) -> None:
    run, eager = load(family, implementation), load(family, None)
    for batch in BATCHES.values():
        assert_equal(outcome(run.model, batch), outcome(eager.model, batch))
    run.log.verify()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_documents_are_computed_as_if_they_were_alone(family: str, load: Load) -> None:
    model = load(family, "pegbox").model
    separate = batch_of([[length] for length in (5, 9, 1, 1, 8, 1, 4, 3)])
    assert torch.equal(separate.targets_BT[separate.targets_BT >= 0], PACKED.targets_BT[PACKED.targets_BT >= 0])
    assert_equal(outcome(model, PACKED), outcome(model, separate))


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("rows", BATCHES)
def test_flex_computes_what_eager_attention_does(family: str, rows: str, load: Load) -> None:
    """Forward: torch has no backward for it on a CPU. There is no runtime, so nobody refuses the CPU."""
    run, eager = load(family, "flex", runtime=None), load(family, None)
    with torch.no_grad():
        got, expected = (
            one.model.compute(one.model.module, BATCHES[rows], frozenset({"logps"})).logps_N for one in (run, eager)
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    run.log.verify()


@pytest.mark.parametrize(("family", "made"), [("qwen3", 1), ("gemma2", 2)])
def test_flex_makes_one_block_mask_for_a_batch_and_kind_of_layers(
    family: str, made: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(family, "flex", runtime=None).model
    with torch.no_grad():
        model.compute(model.module, PACKED, frozenset({"logps"}))
        windows: list[int | None] = []
        make = backends._block_mask
        monkeypatch.setattr(backends, "_block_mask", lambda *a: windows.append(a[2]) or make(*a))
        for batch in (PACKED, batch_of([[4, 6], [7, 3]]), PACKED):
            model.compute(model.module, batch, frozenset({"logps"}))
    assert len(windows) == made  # the trial of packing and PACKED itself made theirs before


def test_gradient_checkpointing_changes_nothing(load: Load) -> None:
    expected = outcome(load("mistral", "pegbox").model, PACKED)
    assert_equal(outcome(load("mistral", "pegbox", "activations").model, PACKED), expected)


def test_adapters_on_attention_are_trained_the_same(load: Load) -> None:
    lora = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "init": "gaussian"}
    runs = [load("mistral", name, "lora", lora=lora) for name in ("pegbox", None)]
    for one, other in zip(*(run.model.module.parameters() for run in runs), strict=True):
        if one.requires_grad:
            one.data.add_(0.05)
            other.data.copy_(one.data)
    expected = outcome(runs[1].model, PACKED)
    assert expected[1]
    assert_equal(outcome(runs[0].model, PACKED), expected)
    runs[0].log.verify()


@pytest.mark.parametrize("implementation", ["pegbox", "sdpa", "eager"])
def test_undone_the_modules_are_the_loaded_ones(implementation: str, load: Load) -> None:
    run = load("llama", implementation)
    before = outcome(run.model, PADDED)[0]
    run.log.undo()
    assert not any("forward" in vars(part) for part in run.model.module.modules())
    assert torch.equal(outcome(run.model, PADDED)[0], before)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("family", ["mistral", "qwen3", "gpt_oss"])
def test_greedy_answers_with_left_padding_are_those_of_eager_attention(family: str, cache: bool, load: Load) -> None:
    prompts_BT = torch.randint(3, 250, (3, 7), generator=torch.Generator().manual_seed(5))
    mask_BT = torch.ones_like(prompts_BT)
    for row, length in enumerate((3, 7, 5)):
        mask_BT[row, : 7 - length] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    answers = [
        load(family, name).model.module.eval().generate(input_ids=prompts_BT, attention_mask=mask_BT, **options)
        for name in ("pegbox", None)
    ]
    assert torch.equal(*answers)


def test_a_network_that_gives_windows_by_masks_only_is_found_out(load: Load) -> None:
    from pegbox.errors import RunError

    run = load("qwen2_moe", "pegbox")
    with pytest.raises(RunError, match="passes the window None to its attention, and its config says 4"):
        outcome(run.model, PADDED)
    assert_equal(outcome(load("qwen2_moe", "sdpa").model, PADDED), outcome(load("qwen2_moe", None).model, PADDED))


def test_a_network_that_is_handed_masks_all_the_time_does_not_count_as_patched(load: Load) -> None:
    from pegbox.errors import PatchError

    run = load("mistral", "pegbox")
    run.model.module.model(PADDED.input_ids_BT, attention_mask=PADDED.attention_mask_BT)
    with pytest.raises(PatchError, match="2 of 2 patched modules were never called"):
        run.log.verify()


def test_borders_with_a_mask_are_refused() -> None:
    from types import SimpleNamespace

    from pegbox.errors import RunError

    attention = MasklessAttention("eager", "eager", deterministic=False)
    q = torch.randn(1, 2, 6, 8)
    module, mask = torch.nn.Identity(), torch.ones(1, 1, 6, 6, dtype=torch.bool)
    module.config = SimpleNamespace()
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(RunError, match="got borders of documents together with a mask"):
        attention(module, q, q, q, mask, cu_seq_lens_q=borders, max_length_q=4)
    with pytest.raises(RunError, match=r"drops 0\.5 of its attention weights"):
        attention(module, q, q, q, None, dropout=0.5)
