"""Is the merged folder the classifier that was trained? What its head predicts at every position, side by side.

A reward is compared with other rewards, so an error counts beside their spread over the probe prompts: the root of its
mean square, divided by the standard deviation of what the trained model predicts.

    T  tokens    C  labels    M  positions of all prompts
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pegbox.rows import UNTRAINED, Batch

from pegbox_merge.side_files import tokenizer_of
from pegbox_merge.verdict import ScoreFigures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pegbox.types import Model
    from torch import Tensor

    from pegbox_merge.runs import Trained


def values(model: Model, ids: list[int]) -> Tensor:
    """What the head predicts after each token, by the forward of a run, in float32 on the host: (tokens, labels)."""
    ids_BT = torch.tensor([ids])
    nothing = torch.empty(0, dtype=torch.int64)
    batch = Batch(input_ids_BT=ids_BT, targets_BT=torch.full_like(ids_BT, UNTRAINED), trained_N=nothing)
    device = next(model.module.parameters()).device
    predicted = model.compute(model.module, batch.to(device), frozenset({"values"})).values_BTC
    assert predicted is not None, "asked for"
    return predicted[0].float().cpu()


def figures(
    expected: Sequence[Tensor],
    bare: Sequence[Tensor],
    found: Sequence[Tensor],
    *,
    prompts_equal: bool,
    padding_equal: bool,
) -> ScoreFigures:
    """Compare the predictions of the trained model, of its base under the trained head, and of the merged one."""
    expected_MC, bare_MC, found_MC = (torch.cat(list(parts)).double() for parts in (expected, bare, found))
    spread = float((expected_MC - expected_MC.mean(0)).square().mean().sqrt())

    def error(other_MC: Tensor) -> float:
        return float((other_MC - expected_MC).square().mean().sqrt()) / max(spread, 1e-12)

    return ScoreFigures(error(found_MC), error(bare_MC), len(expected_MC), prompts_equal, padding_equal)


def padded_alike(trained: Trained, folder: Path, merged: Model) -> bool:
    """Whether the folder's tokenizer and config name the run's padding: the last token that counts follows from it."""
    wanted = tokenizer_of(trained.folder, trained.base_files).pad_token_id
    network: Any = merged.module
    return wanted is None or network.config.pad_token_id == tokenizer_of(folder, folder).pad_token_id == wanted
