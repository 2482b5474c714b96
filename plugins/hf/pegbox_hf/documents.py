"""The promise that documents packed into one row do not see each other, kept for every attention that is used.

transformers builds block-diagonal masks from positions that start anew (eager, sdpa, flex attention) or passes the
borders on (flash attention and its relatives). Some models of it, gpt-oss among them in 5.17, forget to hand the
positions to the masks; a layer such as a recurrence or a convolution over tokens knows of no borders at all. Both mix
documents without a word.

So models known to have such layers are refused, and everything else is tried: with the first packed micro-batch the
trunk runs twice on rows of two documents each, the first of which differ; the hidden states of the second ones must
be the same. If they are not, the masks are made here and handed in, and the trial is made again. An attention that a
plugin brings is thus held to the same promise as ours. The trials have the shape of the batch, so that nothing is
compiled for them alone, and every rank makes them.

    B  rows    T  tokens    H  hidden size    S  document borders
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError, UserError
from torch import Tensor

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from transformers import PreTrainedModel

MIXING_LAYERS = frozenset({"linear_attention", "mamba", "recurrent", "conv", "hybrid"})
"""Names in a config's list of layers that stand for a state or window carried along the row."""
SLACK = {torch.float32: 1e-4, torch.float64: 1e-6}
SLACK_HALF = 2e-2
NEAR = 3
"""Tokens at the beginning of a document that a leak must reach: a layer that passes on one token reaches one more."""


def mixing_layers(network: PreTrainedModel) -> str:
    """What carries something along a row past the border of a document; empty if nothing is known to."""
    config = network.config.get_text_config()
    named = (getattr(config, name, None) for name in ("layer_types", "layers_block_type", "block_types"))
    found = sorted(MIXING_LAYERS & {kind for kinds in named if isinstance(kinds, list | tuple) for kind in kinds})
    if found:
        return f"layers of kind {', '.join(found)}"
    return "a recurrent state" if getattr(network, "_is_stateful", False) else ""


def require_separable(network: PreTrainedModel) -> None:
    """Raise if the network is known to have layers that mix the documents of a row.

    Raises:
        UserError: with what to change.
    """
    mixing = mixing_layers(network)
    if mixing:
        raise UserError(
            f"{type(network).__name__} has {mixing}, and rows are packed",
            "What such a layer carries along a row passes from one document into the next.",
            "Remove packing from plugins.",
        )


def require_one_chunk(network: PreTrainedModel, chunk: int, tokens: int) -> None:
    """Raise if packed rows are longer than the chunk that a layer attends in.

    Raises:
        UserError: with what to change.
    """
    if tokens > chunk:
        raise UserError(
            f"{type(network).__name__} attends in chunks of {chunk} tokens, and packed rows have {tokens}",
            "Chunks are counted from the start of a row, so a document would be cut at another place than alone.",
            f"Set packing.length to {chunk} or less, or remove packing from plugins.",
        )


def crossing(network: PreTrainedModel, batch: Batch, run: Callable[[Batch], Tensor]) -> float:
    """How far the second documents of rows move when the first ones change; 0 if no more than rounding.

    Args:
        network: for the size of its vocabulary.
        batch: the packed micro-batch whose shape is used.
        run: the trunk: a batch to its hidden states `_BTH`.
    """
    tokens = batch.input_ids_BT.shape[1]
    if tokens < 2:
        return 0.0
    first = tokens // 2
    probe = _two_documents(batch, first)
    other = _with_other_tokens(probe, first, network.get_input_embeddings().weight.shape[0])
    one, two = (_seeded(run, trial, first) for trial in (probe, other))
    half = torch.is_autocast_enabled(one.device.type)
    slack = (SLACK_HALF if half else SLACK.get(one.dtype, SLACK_HALF)) * float(one.abs().max())
    change_BT = (one.float() - two.float()).abs().amax(-1)
    return float(change_BT.max()) if _is_leak(change_BT > slack) else 0.0


def _is_leak(moved_BT: Tensor) -> bool:
    """Whether moved tokens of second documents are more than rounding.

    What leaks reaches the first tokens of a document, in every row. Experts are computed for other numbers of tokens
    when a document changes, and rounding may then send a lone token to another expert.
    """
    near = moved_BT[:, :NEAR].float().mean(0) >= 0.5
    return bool(near.sum() >= min(2, len(near))) or bool(moved_BT.float().mean() > 0.5)


def crosses(network: PreTrainedModel, change: float) -> RunError:
    """The error for an attention that crosses documents."""
    return RunError(
        f"packed documents see each other in {type(network).__name__} with attention "
        f"'{network.config._attn_implementation}': other tokens in the first document of a row moved the second by "
        f"{change:.2g}",
        "This attention, or another layer, knows nothing of the borders of documents.",
        "Set hf.attention to sdpa, eager or flex_attention, or remove packing from plugins.",
    )


def document_masks(network: PreTrainedModel, batch: Batch) -> object:
    """Masks of transformers for packed rows, one for each kind of layer, for networks that forget to make them.

    Given positions, transformers asks the device whether rows are packed, and the host waits; so it gets documents.
    """
    from transformers import masking_utils

    positions_BT = batch.position_ids_BT
    starts_BT = torch.diff(positions_BT, prepend=positions_BT[:, :1] - 1, dim=-1) != 1
    documents = masking_utils.packed_sequence_mask_function(starts_BT.cumsum(-1))
    config = network.config.get_text_config()
    rows, tokens = batch.input_ids_BT.shape
    arguments = {
        "config": config,
        "inputs_embeds": torch.empty(rows, tokens, 0, dtype=network.dtype, device=batch.input_ids_BT.device),
        "attention_mask": None,
        "past_key_values": None,
        "and_mask_function": documents,
    }
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(kinds) > 1:
        makers = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
        return {kind: makers[kind](**arguments) for kind in kinds if kind in makers}
    sliding = getattr(config, "sliding_window", None) is not None
    make = masking_utils.create_sliding_window_causal_mask if sliding else masking_utils.create_causal_mask
    return make(**arguments)


def _two_documents(batch: Batch, first: int) -> Batch:
    from dataclasses import replace

    rows, tokens = batch.input_ids_BT.shape
    device = batch.input_ids_BT.device
    positions_T = torch.cat([torch.arange(first, device=device), torch.arange(tokens - first, device=device)])
    starts = torch.arange(rows, device=device)[:, None] * tokens + torch.tensor([0, first], device=device)
    borders = torch.cat([starts.flatten(), torch.tensor([rows * tokens], device=device)])
    return replace(
        batch,
        position_ids_BT=positions_T.expand(rows, tokens),
        cu_seqlens_S=borders.to(torch.int32),
        max_seqlen=tokens - first,
        attention_mask_BT=None,
    )


def _with_other_tokens(probe: Batch, first: int, vocabulary: int) -> Batch:
    from dataclasses import replace

    ids_BT = probe.input_ids_BT.clone()
    ids_BT[:, :first] = (ids_BT[:, :first] + 1) % vocabulary
    return replace(probe, input_ids_BT=ids_BT)


def _seeded(run: Callable[[Batch], Tensor], batch: Batch, first: int) -> Tensor:
    """The hidden states of the second documents; dropout drops the same each time, and no one's randomness moves."""
    device = batch.input_ids_BT.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return run(batch)[:, first:].detach()
