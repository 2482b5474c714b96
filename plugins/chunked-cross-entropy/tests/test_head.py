"""Chunked log-probabilities equal plain ones, and full logits are never made."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError
from pegbox.rows import Batch
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model, Need
from pegbox_chunked_cross_entropy.head import require_chunks
from torch.utils._python_dispatch import TorchDispatchMode

Load = Callable[..., Model]
VOCABULARY = 384


def batch_of(trained: int | None = None) -> Batch:
    batch = tiny_batches(rows=6)[0]
    if trained is None:
        return batch
    from dataclasses import replace

    return replace(batch, trained_N=batch.trained_N[:trained])


def outcome(model: Model, batch: Batch, needs: frozenset[Need]) -> tuple[Any, dict[str, torch.Tensor]]:
    outputs = model.compute(model.module, batch, needs)
    parts = [part for part in (outputs.logps_N, outputs.entropy_N) if part is not None]
    weights = torch.linspace(0.5, 1.5, len(parts[0]))
    sum((part * weights).sum() for part in parts).backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    return [part.detach() for part in parts], gradients


@pytest.mark.parametrize("kind", ["plain", "tied", "scaled", "capped"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_values_and_gradients_equal_those_of_the_plain_head(kind: str, chunk: int, load: Load) -> None:
    needs: frozenset[Need] = frozenset({"logps", "entropy"})
    expected = outcome(load(kind), batch_of(), needs)
    got = outcome(load(kind, chunk), batch_of(), needs)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [{"targets": ["lm_head"]}, {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_is_trained_the_same(lora: dict[str, Any], load: Load) -> None:
    needs: frozenset[Need] = frozenset({"logps"})
    expected = outcome(load("plain", **lora), batch_of(), needs)
    got = outcome(load("plain", 4, **lora), batch_of(), needs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert any("lm_head" in name for name in got[1])


def test_no_trained_token_still_reaches_every_parameter(load: Load) -> None:
    _, gradients = outcome(load("plain", 4), batch_of(0), frozenset({"logps"}))
    assert gradients.keys() == dict(load().module.named_parameters()).keys()
    assert not any(gradient.any() for gradient in gradients.values())


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation returned which is V wide."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, value.shape[0] if value.shape[0] != 32 else 0)
        return result


def test_no_more_logits_than_a_chunk_are_made_in_forward_and_backward(load: Load) -> None:
    rows = []
    for chunk in (None, 4):
        model, batch = load("plain", chunk), batch_of()
        with Largest() as largest:
            outcome(model, batch, frozenset({"logps"}))
        rows.append(largest.rows)
    assert rows == [batch_of().trained_tokens, 4]


def test_autograd_keeps_no_logits(load: Load) -> None:
    kept = []
    for chunk in (None, 4):
        sizes: dict[int, int] = {}
        model = load("plain", chunk)

        def pack(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.compute(model.module, batch_of(), frozenset({"logps"}))
        kept.append(sum(sizes.values()))
    assert kept[0] - kept[1] >= batch_of().trained_tokens * VOCABULARY * 4


def test_a_loss_that_needs_all_logits_is_refused() -> None:
    require_chunks(SimpleNamespace(needs=frozenset({"logps"})))
    with pytest.raises(ConfigError, match="needs all logits"):
        require_chunks(SimpleNamespace(needs=frozenset({"logits"})))
