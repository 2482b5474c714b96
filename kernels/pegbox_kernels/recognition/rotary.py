"""Rotary embeddings, in a copy of an attention's forward.

transformers offers no seam for them: an attention's forward calls the function `apply_rotary_pos_emb` of its file, and
neither that file nor its class may be changed for one model. So the instance gets a copy of its class's forward, the
same compiled code, in which that one name means another function. Nothing is rewritten, and all else that the forward
uses is the same. The function is tried on made-up queries, keys and tables first; a family that turns its heads in
another way is left alone.

    B  rows    T  tokens    A  heads of queries    K  heads of keys    D  size of a head    W  width of a table
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from inspect import signature
from types import FunctionType, MethodType
from typing import Literal

import torch
from torch import Tensor, nn

from pegbox_kernels.recognition.trial import equal, numbers
from pegbox_kernels.rope import rope

NAME = "apply_rotary_pos_emb"
ARGUMENTS = ("q", "k", "cos", "sin")
FURTHER = frozenset({"unsqueeze_dim", "position_ids"})
"""Arguments beyond the tables that mean nothing, or are known."""
DIM = 8

Turn = Callable[..., tuple[Tensor, Tensor]]
RopeKind = Literal["halves", "halves, a number for each pair", "neighbours", "neighbours, half of the tables"]
KINDS: dict[RopeKind, Callable[[int], tuple[int, int, bool]]] = {
    "halves": lambda width: (width, width, False),
    "halves, a number for each pair": lambda width: (2 * width, width, False),
    "neighbours": lambda width: (width, width, True),
    "neighbours, half of the tables": lambda width: (width, width // 2, True),
}
"""For tables of a width: how many numbers of a head are turned, how much of the tables is used, whether neighbours."""


def is_candidate(module: nn.Module) -> bool:
    """Whether its forward calls the function by its name."""
    forward = type(module).forward
    return isinstance(forward, FunctionType) and NAME in forward.__code__.co_names and NAME in forward.__globals__


def kind_of(module: nn.Module) -> RopeKind | None:
    """How the function that its forward calls turns heads, or None if it is none of the known ways."""
    names = tuple(signature(function_of(module)).parameters)
    if names[:4] != ARGUMENTS or not set(names[4:]) <= FURTHER:
        return None
    return next((kind for kind in KINDS if agrees(module, turning(kind))), None)


def function_of(module: nn.Module) -> Turn:
    """The function that its forward calls."""
    found: Turn = type(module).forward.__globals__[NAME]
    return found


@cache
def turning(kind: RopeKind) -> Turn:
    """A function to be called like transformers' `apply_rotary_pos_emb`."""

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: object = None, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """(B, A, T, D), (B, K, T, D), (B or 1, T, W) -> q and k, turned, in their own dtypes."""
        turned, used, interleaved = KINDS[kind](cos.shape[-1])
        tables = (table if used == cos.shape[-1] else table[..., :used] for table in (cos, sin))
        return rope(q, k, *tables, rotary_dim=turned, interleaved=interleaved, heads_dim=unsqueeze_dim)

    return apply_rotary_pos_emb


def forward_with(module: nn.Module, turn: Turn) -> Callable[..., object]:
    """The forward of the module's class, bound to the module, with `turn` under the function's name."""
    return MethodType(_copy(type(module).forward, turn), module)


@lru_cache(maxsize=64)
def _copy(forward: FunctionType, turn: Turn) -> FunctionType:
    """One for all layers of a class, with code of its own: torch.compile keeps what it made by code, with its scope."""
    scope = {**forward.__globals__, NAME: turn}
    del scope["__name__"]  # by which torch.compile would look names up in the file's own scope, and not here
    copy = FunctionType(forward.__code__.replace(), scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy


@torch.no_grad()
def agrees(module: nn.Module, turn: Turn, device: torch.device | None = None, *, as_models: bool = False) -> bool:
    """Whether `turn` gives the same for every width of tables that the module's function can take.

    Args:
        device: where both are tried; the CPU if not given.
        as_models: only tables whose halves are equal, as models make them; `turn` may read one half.
    """
    theirs = function_of(module)
    q, k = (numbers(2, heads, 3, DIM, seed=heads).to(device) for heads in (4, 2))
    compared = 0
    for width in (DIM, DIM // 2):
        cos, sin = (numbers(2, 3, width, seed=seed).to(device) for seed in (7, 8))
        if as_models and width == DIM:
            cos, sin = (torch.cat((table[..., : width // 2],) * 2, -1) for table in (cos, sin))
        try:
            expected = theirs(q, k, cos, sin)
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue
        try:
            found = turn(q.clone(), k.clone(), cos, sin)
        except ValueError:
            return False
        if not all(equal(one, other) for one, other in zip(found, expected, strict=True)):
            return False
        compared += 1
    return compared > 0
