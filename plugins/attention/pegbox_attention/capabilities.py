"""What each implementation can do, as data, and what a model asks of it.

A config that asks for something impossible is an error that names the implementations that could, before weights are
read: what the model asks is in its config. What the device asks is looked at as soon as there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, did_you_mean

from pegbox_attention.installed import absent
from pegbox_attention.place import EVERY, GPUS, HALF, generation

if TYPE_CHECKING:
    from pegbox.types import Model, Runtime

DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
NAMES = {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32", "torch.float64": "fp64"}


@dataclass(frozen=True)
class Capability:
    """What one implementation can do.

    Attributes:
        name: in transformers.
        packing: how documents of one row are kept apart: by their `borders`, or by a `mask` over every pair of tokens
            (`sdpa` on a CPU, and on CUDA in half precision: by borders).
        devices: where it trains: `cpu`, `amd`, or the first GPU of a generation; None: anywhere.
        dtypes: arithmetic it computes in.
        head_dims: least and greatest size of a head, and what it is a multiple of.
        sinks, window, softcap: a learned sink for each head, sliding windows, a soft cap of the logits.
        masked: layers that need a mask of another form: chunks, both sides, states carried along, keys longer than
            values.
        dropout: of attention weights.
        deterministic: can give the same bits each time.
    """

    name: str
    packing: str
    devices: frozenset[str] | None
    dtypes: frozenset[str]
    head_dims: tuple[int, int, int]
    sinks: bool
    window: bool
    softcap: bool
    masked: bool
    dropout: bool
    deterministic: bool


ANY_SIZE = (1, 1 << 16, 1)
CAPABILITIES: dict[str, Capability] = {
    "eager": Capability(
        name="eager",
        packing="mask",
        devices=None,
        dtypes=EVERY,
        head_dims=ANY_SIZE,
        sinks=True,
        window=True,
        softcap=True,
        masked=True,
        dropout=True,
        deterministic=True,
    ),
    "sdpa": Capability(
        name="sdpa",
        packing="mask",
        devices=None,
        dtypes=EVERY,
        head_dims=ANY_SIZE,
        sinks=False,
        window=True,
        softcap=False,  # transformers drops it without a word
        masked=True,
        dropout=True,
        deterministic=False,  # the backward of its flash kernel adds in any order
    ),
    "flex": Capability(
        name="pegbox_flex",
        packing="borders",
        devices=GPUS,  # on the CPU torch has no backward for it
        dtypes=EVERY - {"fp64"},
        head_dims=(16, 256, 1),
        sinks=True,
        window=True,
        softcap=True,
        masked=False,
        dropout=False,
        deterministic=True,
    ),
    "flash-attn-4": Capability(
        name="pegbox_cute",
        packing="borders",
        devices=frozenset({"sm_90", "sm_100"}),  # its backward with sinks knows no other
        dtypes=HALF,
        head_dims=(8, 128, 8),
        sinks=True,
        window=True,
        softcap=True,
        masked=False,
        dropout=False,
        deterministic=True,
    ),
    "pegbox": Capability(
        name="pegbox_triton",
        packing="borders",
        devices=GPUS | {"cpu"},
        dtypes=EVERY - {"fp64"},
        head_dims=(1, 256, 1),
        sinks=True,
        window=True,
        softcap=False,
        masked=False,
        dropout=False,
        deterministic=True,
    ),
}


@dataclass(frozen=True)
class Asked:
    """What a model asks of its attention.

    Attributes:
        masked: why layers need masks of another form; empty: they do not.
        interface: its attention can be chosen by name in transformers.
        dtype: of its weights.
    """

    model: str
    head_dim: int
    window: int | None
    sinks: bool
    softcap: bool
    masked: str
    dropout: float
    interface: bool
    dtype: str


@dataclass(frozen=True)
class Place:
    """Where a run computes: `cpu`, a generation of GPUs, and the arithmetic of its forwards."""

    device: str
    dtype: str


MASKED = {
    "chunked_attention": "attends in chunks",
    "linear_attention": "has layers of linear attention",
    "recurrent": "carries a state along the row",
    "latent_attention": "has keys of another size than its values",
}
"""Traits of models that attention by borders alone does not serve."""


def asked_by(model: Model) -> Asked:
    """What a model asks, from its traits and its config; it may be on the meta device.

    Raises:
        ConfigError: it is no model of transformers.
    """
    config = getattr(model.module, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise ConfigError(
            f"attention is in plugins, and {model.name} is no model of transformers",
            "The plugin chooses among what transformers can call.",
            "Remove attention from plugins.",
        )
    text = config.get_text_config()
    found = [words for trait, words in MASKED.items() if trait in model.traits]
    found += [] if "causal" in model.traits else ["attends to both sides"]
    dtype = next((str(p.dtype) for p in model.module.parameters() if p.is_floating_point()), "torch.float32")
    return Asked(
        model=model.name,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        window=getattr(text, "sliding_window", None) if "sliding_window" in model.traits else None,
        sinks="attention_sinks" in model.traits,
        softcap="attention_softcap" in model.traits,
        masked=" and ".join(found),
        dropout=max(float(getattr(text, name, None) or 0.0) for name in DROPOUTS),
        interface=bool(getattr(model.module, "_supports_attention_backend", False)),
        dtype=NAMES.get(dtype, dtype),
    )


def place_of(runtime: Runtime, asked: Asked) -> Place:
    """Where and how a run computes; without autocast the arithmetic is that of the weights."""
    dtype = runtime.precision if runtime.precision in HALF else asked.dtype
    return Place(generation(runtime.device), dtype)


def problems(able: Capability, asked: Asked, place: Place | None, deterministic: bool) -> Iterator[str]:
    """Why an implementation cannot serve; nothing if it can. Without a place only the model is looked at."""
    low, high, multiple = able.head_dims
    if asked.sinks and not able.sinks:
        yield f"{asked.model} has attention sinks"
    if asked.window is not None and not able.window:
        yield f"{asked.model} has sliding windows"
    if asked.softcap and not able.softcap:
        yield f"{asked.model} caps its attention logits"
    if asked.masked and not able.masked:
        yield f"{asked.model} {asked.masked}"
    if asked.dropout and not able.dropout:
        yield f"{asked.model} drops {asked.dropout} of its attention weights"
    if not low <= asked.head_dim <= high or asked.head_dim % multiple:
        yield f"heads of {asked.model} have {asked.head_dim} dimensions, and it takes {low} to {high}" + (
            f" in steps of {multiple}" if multiple > 1 else ""
        )
    if not asked.interface and able.name not in ("eager", "sdpa"):
        yield f"the attention of {asked.model} cannot be chosen by name in transformers"
    if deterministic and not able.deterministic:
        yield "its backward does not give the same bits each time"
    if place is not None and able.devices is not None and place.device not in able.devices:
        yield f"it does not train on {place.device}"
    if place is not None and place.dtype not in able.dtypes:
        yield f"the arithmetic is {place.dtype}, and it takes {' and '.join(sorted(able.dtypes))}"


def require(name: str, asked: Asked, place: Place | None, *, deterministic: bool) -> None:
    """Raise unless the implementation can do what model, device and config ask.

    Raises:
        ConfigError: saying why not, and naming the implementations that can.
    """
    able = CAPABILITIES.get(name)
    if able is None:
        if deterministic:
            raise ConfigError(
                f"attention.deterministic is set, and attention.implementation is '{name}'",
                "It is a name of transformers, and nothing is known about the bits it gives.",
                f"Set attention.implementation to one of: {', '.join(_able(asked, place, True))}.",
            )
        return
    why = list(problems(able, asked, place, deterministic))
    if why:
        raise ConfigError(
            f"attention.implementation is '{name}', which cannot serve here: {'; '.join(why)}",
            "It would fail later, or leave something out without a word.",
            f"Set attention.implementation to one that can: {', '.join(_able(asked, place, deterministic)) or 'none'}.",
        )


def require_known(name: str) -> None:
    """Raise ConfigError if a name is neither one of ours, nor one of transformers, nor a kernel of the hub."""
    from transformers import AttentionInterface

    known = {*CAPABILITIES, *(key for key in AttentionInterface().valid_keys() if "|" not in key)}
    if name not in known and "/" not in name:
        raise ConfigError(
            f"attention.implementation is '{name}', which neither this plugin nor transformers knows",
            did_you_mean(name, known, "Known:"),
            "Correct attention.implementation, or add the plugin that brings it; a kernel of the hub is written "
            "owner/name.",
        )


def require_installed(name: str) -> None:
    """Raise unless what an implementation needs can be imported.

    Raises:
        ConfigError: with what to type.
    """
    missing = absent(name)
    if missing:
        raise ConfigError(
            f"attention.implementation is '{name}', and {missing.partition('; ')[0]}",
            "It is a package of its own.",
            f"{missing.partition('; ')[2].capitalize()}",
        )


def _able(asked: Asked, place: Place | None, deterministic: bool) -> list[str]:
    return [name for name, able in CAPABILITIES.items() if not any(problems(able, asked, place, deterministic))]
