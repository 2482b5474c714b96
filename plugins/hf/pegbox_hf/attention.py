"""Attention over right-padded rows of a causal model, without a mask.

A token sees what stands before it, and padding comes after: no mask is needed. transformers makes one all the same, or
asks the device whether it could leave it out; either way the host waits for the device in every forward, and with a
mask torch cannot take its fastest kernel. An implementation that is registered for attention and not for masks gets
none (transformers' `AttentionInterface`); it is torch's own, chosen for the length of one forward, so that generation,
which pads on the left, keeps its masks.

Packed rows go further, on a GPU in half precision and on a CPU: attention is computed only inside documents, from their
borders; on a GPU by torch's variable-length attention (flash attention, Dao 2023, arXiv:2307.08691), on a CPU one
document after the other. With the dense mask that torch's usual attention would need, it computes every pair of tokens
of a row, and in transformers the host waits for the device to learn whether a row is packed. The implementation stays
the network's one from the first packed batch on, because layers that are computed again in the backward ask for it
there; without borders it is torch's usual one, with its masks.

An attention that a plugin brings may do without masks too, and in more layers than torch's. Its function, as registered
in `AttentionInterface`, then has the attribute `maskless`: a set of what it computes without one, of `documents` (from
their borders, `cu_seq_lens_q` and `max_length_q`), `sliding_window` (from the argument of that name) and
`chunked_attention`. In a mask's place it gets one element, and plain rows are causal for it.

    B  rows    T  tokens    A  heads    K  heads of keys    D  size of a head    N  B * T
    S  document borders
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pegbox_hf.documents import mixing_layers
from pegbox_hf.traits import traits_of_config

if TYPE_CHECKING:
    from pegbox.rows import Batch
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

MASKLESS = "sdpa_right_padded"
DOCUMENTS = "sdpa_documents"
FACTS = "pegbox_attention_facts"
MASKLESS_PARTS = "maskless"
NEED_A_MASK = frozenset({"sliding_window", "chunked_attention", "linear_attention"})

HALF = (torch.float16, torch.bfloat16)
DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
LARGEST_HEAD = 256
FLASH_CAPABILITY = (8, 0)


def document_attention(
    module: Module,
    query_BATD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **more: object,
) -> tuple[Tensor, None]:
    """Causal attention inside the documents of packed rows; without borders torch's usual one.

    Args:
        cu_seq_lens_q: borders of documents in the flattened batch, from 0 to B * T, int32.
        max_length_q: tokens of the longest document.
        more: what transformers passes on to every attention.

    Returns:
        Attended values `_BTAD`, and None for the attention weights.
    """
    if cu_seq_lens_q is None or max_length_q is None:
        attend = sdpa_attention_forward
        return attend(module, query_BATD, key_BKTD, value_BKTD, attention_mask, scaling=scaling, **more)
    rows, _, tokens, _ = query_BATD.shape
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query_BATD, key_BKTD, value_BKTD)]
    if query_BATD.device.type == "cpu":
        return _one_by_one(*flat, cu_seq_lens_q, scaling).unflatten(0, (rows, tokens)), None
    from torch.nn.attention.varlen import varlen_attn

    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value_BKTD.dtype
    borders, longest = (cu_seq_lens_q, cu_seq_lens_q), (max_length_q, max_length_q)
    halves = (part.to(dtype) for part in flat)
    attended = varlen_attn(*halves, *borders, *longest, scale=scaling, **_varlen_options())
    return attended.unflatten(0, (rows, tokens)), None


@torch.compiler.disable
def _one_by_one(
    query_NAD: Tensor, key_NKD: Tensor, value_NKD: Tensor, borders_S: Tensor, scale: float | None
) -> Tensor:
    """Attended values `_NAD` of N tokens, a document at a time; on a CPU nothing waits for its lengths."""
    lengths = [length for length in borders_S.diff().tolist() if length]
    heads = (part.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for part in (query_NAD, key_NKD, value_NKD))
    attend = partial(scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=True)
    return torch.cat([attend(*document) for document in zip(*heads, strict=True)], dim=2).squeeze(0).transpose(0, 1)


@cache
def _varlen_options() -> dict[str, object]:
    """Causal, with fewer heads of keys than of queries, in the words of this torch; empty: it has no such attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    known = signature(varlen_attn).parameters
    if not {"window_size", "scale"} <= known.keys():
        return {}
    grouped = {"enable_gqa": True} if "enable_gqa" in known else {}
    return {"window_size": (-1, 0), **grouped}


AttentionInterface.register(MASKLESS, sdpa_attention_forward)
AttentionInterface.register(DOCUMENTS, document_attention)
AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)


@dataclass
class AttentionFacts:
    """What the one forward asks of a network each time, found once.

    Attributes:
        needs: what a layer has that causality over the whole row is not enough for; empty: it is.
        chunk: tokens that layers with chunked attention see at once, counted from the start of a row.
        borders: packed rows can be attended to by the borders of documents, wherever it is faster.
        packing_proven: documents of one row were seen not to touch each other, with the attention of this name.
        own_masks: packed rows need masks made by us: the network does not make them from positions.
    """

    needs: frozenset[str]
    chunk: int | None
    borders: bool = False
    packing_proven: str | None = None
    own_masks: bool = False

    @property
    def causal_rows(self) -> bool:
        """Every layer is causal over the whole row."""
        return not self.needs


def facts_of(network: PreTrainedModel) -> AttentionFacts:
    """The facts of a network, kept on it."""
    known: AttentionFacts | None = vars(network).get(FACTS)
    if known is None:
        traits = traits_of_config(network.config)
        needs = traits & NEED_A_MASK
        needs |= frozenset() if "causal" in traits else {"both_sides"}
        needs |= {"mixing_layers"} if mixing_layers(network) else frozenset()
        chunk = getattr(network.config.get_text_config(), "attention_chunk_size", None)
        borders = not needs and _borders_suffice(network)
        known = AttentionFacts(needs, chunk if "chunked_attention" in traits else None, borders)
        setattr(network, FACTS, known)
    return known


def maskless(network: PreTrainedModel) -> frozenset[str]:
    """What the network's attention computes without a mask, as its function says; nothing if some layer needs more."""
    needs, function = facts_of(network).needs, AttentionInterface().get(network.config._attn_implementation)
    able: frozenset[str] = frozenset(getattr(function, MASKLESS_PARTS, ()))
    return able if needs <= able else frozenset()


def needs_no_mask(network: PreTrainedModel, batch: Batch) -> bool:
    """Whether causality alone gives the right attention: plain rows, every layer causal over the whole row."""
    packed = batch.cu_seqlens_S is not None or batch.position_ids_BT is not None
    if packed or network.config._attn_implementation not in ("sdpa", DOCUMENTS):
        return False
    return facts_of(network).causal_rows


def attend_by_borders(network: PreTrainedModel, batch: Batch) -> None:
    """Let a network that takes torch's attention take it by documents, where it can: for good, see above."""
    if network.config._attn_implementation != "sdpa" or not facts_of(network).borders:
        return
    device = batch.input_ids_BT.device
    if device.type == "cpu" or (device.type == "cuda" and _flash_takes(network, device)):
        network.config._attn_implementation = DOCUMENTS


def no_mask(batch: Batch) -> Tensor:
    """What a network takes for a mask that is made already, so that it makes none; nothing reads it."""
    return batch.input_ids_BT.new_empty(1, 1, 1, 1, dtype=torch.bool)


def _borders_suffice(network: PreTrainedModel) -> bool:
    """Whether plain causal attention inside documents is what this network's attention computes."""
    config = network.config.get_text_config()
    plain = not traits_of_config(config) & {"latent_attention", "attention_softcap"}
    return plain and not any(getattr(config, name, None) for name in DROPOUTS)


def _flash_takes(network: PreTrainedModel, device: torch.device) -> bool:
    """Whether torch's variable-length attention runs there, in this arithmetic and with heads of this size."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else network.dtype
    config = network.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = dtype in HALF and size % 8 == 0 and size <= LARGEST_HEAD and bool(_varlen_options())
    return fits and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


@contextmanager
def without_mask(network: PreTrainedModel) -> Iterator[None]:
    """Within, the network attends causally and makes no mask."""
    before = network.config._attn_implementation
    network.config._attn_implementation = MASKLESS
    try:
        yield
    finally:
        network.config._attn_implementation = before
