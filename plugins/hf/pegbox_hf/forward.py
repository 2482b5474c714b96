"""One forward of a causal language model: the trunk over all tokens, the head over the trained ones.

Packed rows: attention stays inside a document because positions start anew there (eager, sdpa and flex attention
read that from `position_ids`) and because `cu_seqlens` says where documents begin (flash attention and its relatives).
A padding mask together with packing would switch the first off, so it is left out: padding at the end of a row
is a document of its own, and nothing looks at it. With the first packed batch the promise is tried (`documents`).

    B  rows    T  tokens    N  trained tokens    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pegbox.errors import RunError
from pegbox.rows import Batch
from pegbox.types import Need, Outputs

from pegbox_hf.attention import (
    DOCUMENTS,
    attend_by_borders,
    facts_of,
    maskless,
    needs_no_mask,
    no_mask,
    without_mask,
)
from pegbox_hf.documents import crosses, crossing, document_masks, require_one_chunk, require_separable

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel
    from transformers.utils import ModelOutput

HEAD = "token_head"
FROM_HEAD = frozenset({"logps", "entropy", "logits"})
FROM_TRUNK = frozenset({"hidden", "router_logits"})
DOCUMENTS_FROM_POSITIONS = ("eager", "sdpa", "flex_attention")


def compute(module: Module, batch: Batch, needs: frozenset[Need]) -> Outputs:
    """Run one forward and return what was asked for.

    Args:
        module: a causal language model of transformers, bare or inside a PEFT wrapper.
        batch: tokens, targets and the trained positions.
        needs: which outputs; the head runs only if one of them comes from it. With no trained position the
            outputs are empty and still hang on every parameter, as processes that train together need it.

    Raises:
        RunError: an output that a causal language model does not have, or packed documents that see each other.
        UserError: rows are packed, and the model cannot keep documents apart.
    """
    unknown = needs - FROM_HEAD - FROM_TRUNK
    if unknown:
        raise RunError(
            f"the loss needs {', '.join(sorted(unknown))}, which a causal language model does not return",
            f"It returns {', '.join(sorted(FROM_HEAD | FROM_TRUNK))}.",
            "Use another loss, or a plugin whose model returns it.",
        )
    network = bare(module)
    returned = run_trunk(network, batch, router_logits="router_logits" in needs)
    hidden_BTH = returned.last_hidden_state
    outputs = Outputs()
    if needs & FROM_HEAD:
        hidden_NH = hidden_BTH.flatten(0, 1)[batch.trained_N]
        targets_N = batch.targets_BT.flatten()[batch.trained_N]
        outputs = network.get_submodule(HEAD)(hidden_NH, network.get_output_embeddings(), targets_N, needs)
    return replace(
        outputs,
        hidden_BTH=hidden_BTH if "hidden" in needs else None,
        router_logits=router_logits_of(network, returned) if "router_logits" in needs else None,
    )


def run_trunk(network: PreTrainedModel, batch: Batch, *, router_logits: bool) -> ModelOutput:
    """The trunk over all tokens, plain or packed; what it returns has `last_hidden_state`, `_BTH`.

    Raises:
        RunError: packed documents see each other.
        UserError: rows are packed, and the model cannot keep documents apart.
    """
    if batch.cu_seqlens_S is not None:
        _require_documents_apart(network, batch)
    arguments = trunk_arguments(network, batch) | {"output_router_logits": router_logits}
    if needs_no_mask(network, batch):
        with without_mask(network):
            return trunk(network)(**arguments | {"attention_mask": None})
    return trunk(network)(**arguments)


def _require_documents_apart(network: PreTrainedModel, batch: Batch) -> None:
    """Try the network once for each attention it is used with; every rank does so with its first packed batch."""
    attend_by_borders(network, batch)
    facts, attention = facts_of(network), network.config._attn_implementation
    if facts.chunk is not None:
        require_one_chunk(network, facts.chunk, batch.input_ids_BT.shape[1])
    if facts.packing_proven == attention:
        return
    require_separable(network)
    trunk_arguments(network, batch)

    def run(trial: Batch) -> Tensor:
        return trunk(network)(**trunk_arguments(network, trial)).last_hidden_state

    # Where a mask is causal and no more, ours is made without asking the device whether rows are packed.
    facts.own_masks = facts.causal_rows and batch.input_ids_BT.device.type == "cuda"
    change = crossing(network, batch, run)
    if change and attention == DOCUMENTS:
        facts.borders, attention = False, "sdpa"
        network.config._attn_implementation = attention
        change = crossing(network, batch, run)
    if change and not facts.own_masks and attention in DOCUMENTS_FROM_POSITIONS:
        facts.own_masks = True
        change = crossing(network, batch, run)
    if change:
        raise crosses(network, change)
    facts.packing_proven = attention


def bare(module: Module) -> PreTrainedModel:
    """The language model inside a PEFT wrapper, or the module itself; adapters are layers of it either way."""
    unwrap = getattr(module, "get_base_model", None)
    return module if unwrap is None else unwrap()


def trunk(network: PreTrainedModel) -> Module:
    """The part of a language model that ends in the last hidden states."""
    decoder = network.get_decoder()
    return network.get_submodule("model") if decoder is network else decoder


def trunk_arguments(network: PreTrainedModel, batch: Batch) -> dict[str, object]:
    """What the trunk takes, for plain and for packed rows.

    Raises:
        RunError: rows are packed and the batch has no positions.
    """
    arguments: dict[str, object] = {"input_ids": batch.input_ids_BT, "use_cache": False}
    if batch.position_ids_BT is not None:
        arguments["position_ids"] = batch.position_ids_BT
    able = maskless(network)
    if batch.cu_seqlens_S is None:
        plain = bool(able) and batch.position_ids_BT is None
        arguments["attention_mask"] = no_mask(batch) if plain else batch.attention_mask_BT
        return arguments
    if batch.position_ids_BT is None:
        raise RunError(
            "a packed batch has cu_seqlens but no position_ids",
            "Without positions that start anew at each document, attention would cross documents.",
            "Have the plugin that packs set Batch.position_ids_BT.",
        )
    if network.config._attn_implementation not in DOCUMENTS_FROM_POSITIONS:
        borders = {"cu_seq_lens_q": batch.cu_seqlens_S, "cu_seq_lens_k": batch.cu_seqlens_S}
        by_borders = network.config._attn_implementation == DOCUMENTS or "documents" in able
        mask = {"attention_mask": no_mask(batch)} if by_borders else {}
        return arguments | {**borders, **mask, "max_length_q": batch.max_seqlen, "max_length_k": batch.max_seqlen}
    if facts_of(network).own_masks:
        arguments["attention_mask"] = document_masks(network, batch)
    return arguments


def router_logits_of(network: PreTrainedModel, returned: object) -> tuple[object, ...]:
    """What the routers of a mixture of experts said in one forward.

    Raises:
        RunError: the network has no routers.
    """
    logits = getattr(returned, "router_logits", None)
    if not logits:
        raise RunError(
            f"the loss needs router_logits, but {type(network).__name__} returned none",
            "Only mixtures of experts have routers.",
            "Remove the loss that needs them, or use a mixture of experts.",
        )
    return tuple(logits)
