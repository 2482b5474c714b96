"""Attention over right-padded rows of a causal model, without a mask.

A token sees what stands before it, and padding comes after: no mask is needed. transformers makes one all the same, or
asks the device whether it could leave it out; either way the host waits for the device in every forward, and with a
mask torch cannot take its fastest kernel. An implementation that is registered for attention and not for masks gets
none (transformers' `AttentionInterface`); it is torch's own, chosen for the length of one forward, so that generation,
which pads on the left, keeps its masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pegbox_hf.documents import mixing_layers
from pegbox_hf.traits import traits_of_config

if TYPE_CHECKING:
    from pegbox.types import Batch
    from transformers import PreTrainedModel

MASKLESS = "sdpa_right_padded"
FACTS = "pegbox_attention_facts"
NEED_A_MASK = frozenset({"sliding_window", "chunked_attention", "linear_attention"})

AttentionInterface.register(MASKLESS, sdpa_attention_forward)


@dataclass
class AttentionFacts:
    """What the one forward asks of a network each time, found once.

    Attributes:
        causal_rows: every layer is causal over the whole row.
        chunk: tokens that layers with chunked attention see at once, counted from the start of a row.
        packing_proven: documents of one row were seen not to touch each other, with the attention of this name.
        own_masks: packed rows need masks made by us: the network does not make them from positions.
    """

    causal_rows: bool
    chunk: int | None
    packing_proven: str | None = None
    own_masks: bool = False


def facts_of(network: PreTrainedModel) -> AttentionFacts:
    """The facts of a network, kept on it."""
    known: AttentionFacts | None = vars(network).get(FACTS)
    if known is None:
        traits = traits_of_config(network.config)
        causal = "causal" in traits and not traits & NEED_A_MASK and not mixing_layers(network)
        chunk = getattr(network.config.get_text_config(), "attention_chunk_size", None)
        known = AttentionFacts(causal, chunk if "chunked_attention" in traits else None)
        setattr(network, FACTS, known)
    return known


def needs_no_mask(network: PreTrainedModel, batch: Batch) -> bool:
    """Whether causality alone gives the right attention: plain rows, every layer causal over the whole row."""
    packed = batch.cu_seqlens_S is not None or batch.position_ids_BT is not None
    if packed or network.config._attn_implementation != "sdpa":
        return False
    return facts_of(network).causal_rows


@contextmanager
def without_mask(network: PreTrainedModel) -> Iterator[None]:
    """Within, the network attends causally and makes no mask."""
    before = network.config._attn_implementation
    network.config._attn_implementation = MASKLESS
    try:
        yield
    finally:
        network.config._attn_implementation = before
