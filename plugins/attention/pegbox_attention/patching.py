"""The chosen implementation as a name of transformers, and as patch records that prove that it acts.

What transformers has keeps its name, and its modules are counted. What is brought here is registered under a name of
its own in transformers' `AttentionInterface`, and counts what it computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, RunError
from pegbox.types import ModulePatch, SeamChange

from pegbox_attention.capabilities import CAPABILITIES, Asked, Capability, place_of

if TYPE_CHECKING:
    from pegbox.types import Model, Runtime
    from torch.nn import Module

    from pegbox_attention.checking import Heads
    from pegbox_attention.config import AttentionConfig

SEAM = "transformers.AttentionInterface"
OWN = frozenset({"flex", "flash-attn-4", "pegbox"})
SOURCES = {"flash-attn-4": "arXiv:2307.08691", "flex": "arXiv:2412.05496", "pegbox": "pegbox-kernels, op attention"}


def name_in_transformers(config: AttentionConfig) -> str:
    """What `from_pretrained` is told; the deterministic way of an own implementation is one of its own."""
    able = CAPABILITIES.get(config.implementation)
    if able is None:
        return config.implementation
    return f"{able.name}_deterministic" if config.deterministic and config.implementation in OWN else able.name


def register(config: AttentionConfig) -> Any:
    """The function behind an implementation that is brought here, known to transformers; None for its own ones."""
    if config.implementation not in OWN:
        return None
    from pegbox_attention.maskless import MasklessAttention, registered

    chosen: Any = config.implementation
    return registered(
        name_in_transformers(config),
        lambda: MasklessAttention(chosen, chosen, deterministic=config.deterministic),
    )


def hold_to_plain_attention(config: AttentionConfig, model: Model, asked: Asked, runtime: Runtime) -> str:
    """How near an implementation that is brought here is to plain attention on the model's shape, in words.

    Raises:
        RunError: it is wrong, or it does not run; with what to choose instead.
    """
    from pegbox_attention.checking import check

    chosen: Any = config.implementation
    worst = None
    for heads in _shapes(model, asked):
        try:
            dtype = place_of(runtime, asked).dtype
            checked = check(chosen, heads, runtime.device, dtype, deterministic=config.deterministic)
        except Exception as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise _wrong(config, f"{heads}: it does not run: {said[0]}") from error
        if not checked.right:
            raise _wrong(config, f"{heads}: {checked}")
        worst = checked if worst is None or checked.error > worst.error else worst
    return str(worst)


def _shapes(model: Model, asked: Asked) -> list[Heads]:
    """One for each kind of layers: window layers and those that see the whole row."""
    from pegbox_attention.checking import Heads

    text = model.module.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    windows = {asked.window} if asked.window is None or kinds == {"sliding_attention"} else {asked.window, None}
    heads, softcap = text.num_attention_heads, getattr(text, "attn_logit_softcapping", None)
    keys = getattr(text, "num_key_value_heads", None) or heads
    return [Heads(heads, keys, asked.head_dim, window, asked.sinks, softcap) for window in windows]


def _wrong(config: AttentionConfig, how: str) -> RunError:
    return RunError(
        f"attention.implementation '{config.implementation}' fails its check on {how}",
        "Before training it is compared with plain attention on random numbers of the model's shape.",
        "Set attention.implementation to another one, such as eager, and report this.",
    )


def is_attention(network: Module, *, own: bool) -> Callable[[str, Module], bool]:
    """Whether a module computes attention in the language model.

    With `own`, only those whose implementation transformers looks up in the network's config each time.
    """
    config: Any = getattr(network, "config", None)
    text = config.get_text_config()

    def named(module: Module) -> bool:
        return "Attention" in type(module).__name__

    def matches(_: str, module: Module) -> bool:
        found = getattr(module, "config", None)
        here = found is config or found is text
        if own:
            return named(module) and here and hasattr(module, "layer_idx")
        innermost = not any(named(part) for part in module.modules() if part is not module)
        return named(module) and innermost and (here or found is None)

    return matches


def patches(config: AttentionConfig, model: Model, checked: str = "") -> list[ModulePatch]:
    """The record for one model; `checked` is what a check of the implementation said.

    Raises:
        ConfigError: transformers loaded the model with another attention than was asked for.
    """
    name, now = name_in_transformers(config), model.module.config._attn_implementation
    if name != now and config.implementation not in OWN:
        raise ConfigError(
            f"attention.implementation is '{config.implementation}', and transformers took '{now}' for {model.name}",
            "It has its own list of what a model may be computed with.",
            f"Set attention.implementation to {now}.",
        )
    function = register(config)

    def replace(module: Module) -> Any:
        if function is None:
            return module.forward  # as it is: the kernel counts its calls
        return SeamChange(
            seam=SEAM,
            holder=model.module.config,
            attribute="_attn_implementation",
            value=name,
            calls=function.counter(module),
        )

    return [
        ModulePatch(
            slot="attention",
            target=is_attention(model.module, own=function is not None),
            replace=replace,
            reason=_reason(config, CAPABILITIES.get(config.implementation)) + (f"; {checked}" if checked else ""),
            source=SOURCES.get(config.implementation, ""),
        )
    ]


def _reason(config: AttentionConfig, able: Capability | None) -> str:
    if able is None:
        return f"{config.implementation}, unproven here: transformers gets the name as it stands"
    packed = {"borders": "documents by their borders, no masks", "mask": "documents by masks"}[able.packing]
    return f"{config.implementation}: {packed}{', deterministic' if config.deterministic else ''}"
