"""Which backend computes which layers: an order for each kind of layers, and what each backend needs.

The orders are data with their reason: expectations, to be changed by measurements.

    H  heads    K  heads of keys and values    D  size of a head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pegbox.errors import ConfigError

from pegbox_attention.installed import absent
from pegbox_attention.place import EVERY, GPUS, HALF, generation

if TYPE_CHECKING:
    from pegbox.types import Runtime

    from pegbox_attention.checking import Heads
    from pegbox_attention.sinks.config import GptOssAttentionConfig

Kind = Literal["full", "window"]
Backend = Literal["flash-attn-4", "pegbox", "flex", "eager"]


@dataclass(frozen=True)
class Preference:
    """Backends from the most to the least wanted, and why."""

    order: tuple[Backend, ...]
    reason: str


PREFERENCES: dict[Kind, Preference] = {
    "full": Preference(("flash-attn-4", "pegbox", "flex", "eager"), "flash-attn-4 is written for these GPUs alone"),
    "window": Preference(
        ("pegbox", "flash-attn-4", "flex", "eager"),
        "pegbox has a backward of its own for short windows, in one pass",
    ),
}


@dataclass(frozen=True)
class Needs:
    """What a backend needs to compute attention with sinks, forward and backward.

    Attributes:
        devices: `cpu`, `amd`, or the first GPU of a generation; None: any.
        dtypes: arithmetic it computes in.
        head_dims: least and greatest size of a head, and what it is a multiple of.
    """

    devices: frozenset[str] | None
    dtypes: frozenset[str]
    head_dims: tuple[int, int, int]


NEEDS: dict[Backend, Needs] = {
    "flash-attn-4": Needs(frozenset({"sm_90", "sm_100"}), HALF, (8, 128, 8)),  # gradients of sinks exist there alone
    "pegbox": Needs(GPUS | {"cpu"}, EVERY - {"fp64"}, (1, 256, 1)),
    "flex": Needs(GPUS, EVERY - {"fp64"}, (16, 256, 1)),  # torch has no backward for it on the CPU
    "eager": Needs(None, EVERY, (1, 1 << 16, 1)),
}


@dataclass(frozen=True)
class Place:
    """Where a run computes: `cpu`, `amd` or a generation of GPUs; and the arithmetic of its forwards, if known."""

    device: str
    dtype: str | None


def choose(kind: Kind, config: GptOssAttentionConfig, heads: Heads, place: Place) -> Backend:
    """The backend of a kind of layers.

    Raises:
        ConfigError: the one that is asked for cannot serve, with why and what can.
    """
    wanted = config.wanted(kind)
    order = PREFERENCES[kind].order
    able = [name for name in order if not obstacle(name, place, heads)]
    if wanted == "auto":
        return able[0]
    if wanted not in able:
        key = "backend" if config.window_backend is None or kind == "full" else "window_backend"
        raise ConfigError(
            f"gpt-oss-attention.{key} is {wanted}, and it cannot serve here: {obstacle(wanted, place, heads)}",
            f"These layers have {heads}, computed in {place.dtype} on {place.device}.",
            f"Set gpt-oss-attention.{key} to {' or '.join([*able, 'auto'])}.",
        )
    return wanted


def obstacle(name: Backend, place: Place, heads: Heads | None = None) -> str:
    """Why a backend cannot serve at a place; empty if it can. Without heads only the place is looked at."""
    needs = NEEDS[name]
    missing = absent(name)
    if missing:
        return missing
    if needs.devices is not None and place.device not in needs.devices:
        return f"{name} does not train with sinks on {place.device}"
    if place.dtype is not None and place.dtype not in needs.dtypes:
        return f"{name} computes in {' and '.join(sorted(needs.dtypes))}, not in {place.dtype}"
    low, high, multiple = needs.head_dims
    if heads is not None and (not low <= heads.size <= high or heads.size % multiple):
        return f"{name} takes heads of {low} to {high} numbers in steps of {multiple}"
    return ""


def require_possible(config: GptOssAttentionConfig, place: Place | None) -> None:
    """Raise if a backend that is asked for by name is not installed, or cannot serve at this place.

    Raises:
        ConfigError: with what to type.
    """
    for key, wanted in (("backend", config.backend), ("window_backend", config.window_backend)):
        if wanted is None or wanted == "auto":
            continue
        why = absent(wanted) if place is None else obstacle(wanted, place)
        if why:
            raise ConfigError(
                f"gpt-oss-attention.{key} is {wanted}, and it cannot serve here: {why}",
                "A backend that is asked for by name is not replaced by another.",
                f"Set gpt-oss-attention.{key} to auto, which takes the best one that can.",
            )


def place_of(runtime: Runtime, weights: str | None = None) -> Place:
    """Where and how a run computes; without autocast the arithmetic is that of the weights, once they are known."""
    return Place(generation(runtime.device), runtime.precision if runtime.precision in HALF else weights)
