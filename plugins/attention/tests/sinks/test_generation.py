"""A patched model generates what the eager one does: from a cache, from left-padded prompts, sampled in inference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from document_batches import Run, batch_of, outcome

Load = Callable[..., Run]


def generated(run: Run, prompts_BT: torch.Tensor, mask_BT: torch.Tensor, *, cache: bool) -> torch.Tensor:
    module = run.model.module.eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "use_cache": cache, "pad_token_id": 0}
    return module.generate(input_ids=prompts_BT, attention_mask=mask_BT, **options)


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_greedy_answers_are_those_of_eager_attention(padded: bool, cache: bool, load: Load) -> None:
    random = torch.Generator().manual_seed(5)
    prompts_BT = torch.randint(3, 250, (3, 7), generator=random)
    mask_BT = torch.ones_like(prompts_BT)
    for row, length in enumerate((3, 7, 5) if padded else ()):
        mask_BT[row, : 7 - length] = 0
        prompts_BT[row, : 7 - length] = 0
    expected = generated(load(None, hf={"attention": "eager"}), prompts_BT, mask_BT, cache=cache)
    assert torch.equal(generated(load({"backend": "pegbox"}), prompts_BT, mask_BT, cache=cache), expected)


def test_training_goes_on_after_generation(load: Load) -> None:
    """Borders and tables that were made without gradients in mind serve a backward."""
    run, batch = load({"backend": "pegbox", "window_backend": "eager"}), batch_of([[7], [7], [7]])
    expected = outcome(load(None, hf={"attention": "eager"}).model, batch)
    with torch.inference_mode():
        run.model.compute(run.model.module, batch, frozenset({"logps"}))
    run.model.module.train()
    got = outcome(run.model, batch)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
