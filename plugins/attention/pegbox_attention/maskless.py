"""The function that transformers calls for attention: borders of documents in, no mask needed.

It is registered under a name in transformers' `AttentionInterface`, and says by its attribute `maskless` what it
computes without a mask; who runs the network then makes none and hands over borders. Making masks costs T * T numbers
for each kind of layer, and in transformers the host waits for the device to see whether one is needed.

Three ways lead through it:

- with borders (`cu_seq_lens_q`): causal inside documents;
- without borders and without a mask, as many keys as queries: every row is a document. Padding stands on the right, and
  what stands after a token is not seen by it;
- with a mask, or with keys from a cache (generation): dense attention with that mask, as transformers computes it.

Only the first two count as calls: a network that is handed masks all the time does not use the backend.

The plugins `attention` and `gpt-oss-attention` hold this file in the same words, see `backends`.

    B  rows    Q  queries of a row    U  keys of a row    H  heads    K  heads of keys    D  size of a head
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pegbox_attention.backends import Backend, Borders, Masks, Rule, backend, dense_attention

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from transformers import PretrainedConfig

NO_MASK = (1, 1, 1, 1)
"""The shape of what stands in a mask's place so that a network makes none."""


def window_of(module: Module) -> int | None:
    """The window that the config of an attention module gives its layer, itself counted; None: the whole row."""
    config: PretrainedConfig = module.config
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kinds:
        return window if kinds[module.layer_idx] == "sliding_attention" else None
    return None if getattr(config, "use_sliding_window", None) is False else window


class MasklessAttention:
    """Attention of every layer of a network by borders.

    Args:
        full, window: the backend of layers that see the whole row, and of those with a sliding window.
        deterministic: the same bits each time, where a backend has a faster way that gives others.

    Attributes:
        maskless: what is computed without a mask.
    """

    maskless = frozenset({"documents", "sliding_window"})

    def __init__(self, full: Backend, window: Backend, *, deterministic: bool) -> None:
        masks = Masks()
        self._full, self._window = backend(full, masks), backend(window, masks)
        self._deterministic = deterministic
        self._idle: weakref.WeakKeyDictionary[Module, list[int]] = weakref.WeakKeyDictionary()
        self._proving = False

    def counter(self, module: Module) -> Callable[[], int]:
        """1 once a backend has computed the attention of `module` since now, else 0."""
        count = [0]
        self._idle[module] = count
        self._proving = True
        return lambda: count[0]

    @torch.compiler.disable
    def _begin(self, module: Module, window: int | None) -> None:
        """The first call of a module: it is counted, and its window must be the one that its config gives."""
        count = self._idle.pop(module, None)
        self._proving = bool(self._idle)  # a compiled forward is compiled once more when it turns, not for each layer
        if count is not None:
            count[0] = 1
            if window_of(module) != window:
                raise RunError(
                    f"{type(module).__name__} of layer {module.layer_idx} passes the window {window} to its attention, "
                    f"and its config says {window_of(module)}",
                    "This model gives windows by masks only, and here no masks are made.",
                    "Choose the attention sdpa or eager.",
                )

    def __call__(
        self,
        module: Module,
        query_BHQD: Tensor,
        key_BKUD: Tensor,
        value_BKUD: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        s_aux: Tensor | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **more: object,
    ) -> tuple[Tensor, None]:
        """Attended values `_BQHD`, and None for the attention weights; arguments as transformers passes them."""
        rows, heads, queries, size = query_BHQD.shape
        scale = size**-0.5 if scaling is None else scaling
        asked = more.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if asked is None else asked)
        masked = attention_mask is not None and attention_mask.shape != NO_MASK
        unknown = more.get("position_bias") is not None
        if masked or unknown or not causal or key_BKUD.shape[2] != queries:
            if cu_seq_lens_q is not None:
                raise _mixed(module)
            if s_aux is None and softcap is None:
                options = {"scaling": scale, "dropout": dropout, **more}
                return sdpa_attention_forward(module, query_BHQD, key_BKUD, value_BKUD, attention_mask, **options)
            parts = (query_BHQD, key_BKUD, value_BKUD, attention_mask)
            attended = dense_attention(*parts, scale=scale, sinks_H=s_aux, softcap=softcap, dropout=dropout)
            return attended.transpose(1, 2), None
        if dropout:
            raise _dropped(module, dropout)
        if self._proving:
            self._begin(module, sliding_window)
        if cu_seq_lens_q is None or max_length_q is None:
            # Not kept in a graph, nor where tensors have no data (an estimate of memory): a later run would find them.
            make = _rows_now if torch.compiler.is_compiling() or isinstance(query_BHQD, FakeTensor) else _rows
            borders = make(rows, queries, query_BHQD.device)
        else:
            borders = Borders(cu_seq_lens_q, max_length_q)
        q_THD, k_TKD, v_TKD = (_flattened(part, value_BKUD.dtype) for part in (query_BHQD, key_BKUD, value_BKUD))
        rule = Rule(scale, sliding_window, softcap, self._deterministic)
        attend = self._full if sliding_window is None else self._window
        attended_THD = attend(q_THD, k_TKD, v_TKD, s_aux, borders, rule)
        return attended_THD.reshape(rows, queries, heads, -1), None


def registered(name: str, make: Callable[[], MasklessAttention]) -> MasklessAttention:
    """The attention of this name; made and registered if it is not there, with masks for what needs them."""
    known = AttentionInterface().get(name)
    if isinstance(known, MasklessAttention):
        return known
    made = make()
    AttentionInterface.register(name, made)
    AttentionMaskInterface.register(name, sdpa_mask)
    return made


@lru_cache(maxsize=16)
def _rows(rows: int, tokens: int, device: torch.device) -> Borders:
    """Borders of rows that are one document each; kept, so that masks made for them are too."""
    with torch.inference_mode(False):
        return _rows_now(rows, tokens, device)


def _rows_now(rows: int, tokens: int, device: torch.device) -> Borders:
    return Borders(torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device), tokens)


def _flattened(part_BHQD: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and tokens as one, in the arithmetic of the forward; `dtype` is that of values, which no norm or rotation
    has changed."""
    device = part_BHQD.device.type
    autocast = torch.is_autocast_enabled(device)
    return part_BHQD.transpose(1, 2).flatten(0, 1).to(torch.get_autocast_dtype(device) if autocast else dtype)


def _mixed(module: Module) -> RunError:
    return RunError(
        f"{type(module).__name__} got borders of documents together with a mask, a cache, or attention to both sides",
        "It computes causal attention inside documents from borders alone.",
        "Report this with the model's name.",
    )


def _dropped(module: Module, dropout: float) -> RunError:
    return RunError(
        f"{type(module).__name__} drops {dropout} of its attention weights",
        "Attention that never lays its weights out cannot drop them.",
        "Set attention_dropout of the model's config to 0, or choose the attention eager.",
    )
