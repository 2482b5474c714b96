"""Which modules and stacked parameters the config means, by their full names; what matches nothing is an error.

In a model with more than a language model, `all-linear`, ends of names and regular expressions stay inside the language
model, unless the text names the other part: its name (`vision_tower`, `multi_modal_projector` ...) occurs in it.
Adapters on a frozen vision tower cost memory and change what its projector was trained for, and rarely are meant.

What PEFT is told is the shortest description that PEFT itself reads as these very names, because the same description
is written into `adapter_config.json` and read again by whoever opens the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox.errors import UserError, did_you_mean

from pegbox_lora.config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    from pegbox.types import Model
    from torch.nn import Module

SHOWN = 12


@dataclass(frozen=True)
class Targets:
    """What is adapted.

    Attributes:
        modules: full names of modules with an update of their own.
        parameters: full names of stacked parameters.
        wanted: how PEFT is told the modules: a regular expression or names; `layers` is told with it if `by_layer`.
    """

    modules: frozenset[str]
    parameters: frozenset[str]
    wanted: str | list[str]
    by_layer: bool


def resolve(settings: LoraConfig, model: Model) -> Targets:
    """What the config's targets, exclusions, layers and parameters mean in this model.

    Raises:
        UserError: a name or expression matches nothing, or only parts outside the language model.
    """
    names = [name for name, _ in model.module.named_modules() if name]
    _require_matches(settings, model, names)
    _require_layers(settings, model, names)
    other = other_parts(model.module)
    chosen = _chosen(settings, model, names, other)
    kept = {name for name in chosen if not _excluded(settings, name) and _in_layers(settings, name)}
    if settings.targets and not kept:
        raise UserError(
            f"lora.targets matches {len(chosen)} modules of {model.name}, and lora.exclude, lora.layers or "
            "lora.modules_to_save leave none of them",
            "An adapter on nothing would train nothing.",
            "Correct one of them.",
        )
    parameters = _parameters(settings, model, other)
    wanted, by_layer = _shortest(settings, names, kept)
    return Targets(frozenset(kept), frozenset(parameters), wanted, by_layer)


def other_parts(module: Module) -> tuple[str, ...]:
    """Names of the parts of a multimodal model beside its language model: towers and projectors; else nothing.

    They are what hangs on the way from the model down to its decoder and is neither on that way nor the head.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "get_text_config") or config.get_text_config() is config:
        return ()
    decoder, head = module.get_decoder(), module.get_output_embeddings()
    path = next((name for name, part in module.named_modules() if part is decoder), "")
    steps = path.split(".") if path else []
    found = []
    for depth in range(len(steps)):
        at = ".".join(steps[:depth])
        for name, part in module.get_submodule(at).named_children():
            if name != steps[depth] and part is not head:
                found.append(f"{at}.{name}" if at else name)
    return tuple(found)


def linear_names(module: Module) -> list[str]:
    """Names of all linear layers but the head; in multimodal models those of the language model."""
    from torch.nn import Linear

    head = getattr(module, "get_output_embeddings", lambda: None)()
    kinds, other = (Linear, *_other_linear()), other_parts(module)
    every = [name for name, layer in module.named_modules() if isinstance(layer, kinds) and layer is not head]
    return [name for name in every if _part_of(name, other) is None]


def _other_linear() -> tuple[type, ...]:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return ()
    return (Conv1D,)


def ends_with(name: str, end: str) -> bool:
    """Whether a full name is `end`, or ends with it at a dot."""
    return name == end or name.endswith(f".{end}")


def _part_of(name: str, parts: Iterable[str]) -> str | None:
    return next((part for part in parts if name == part or name.startswith(f"{part}.")), None)


def _chosen(settings: LoraConfig, model: Model, names: Sequence[str], other: tuple[str, ...]) -> set[str]:
    if settings.targets == ALL_LINEAR:
        return set(linear_names(model.module))
    if isinstance(settings.targets, str):
        return _inside(settings.targets, [name for name in names if re.fullmatch(settings.targets, name)], other, model)
    return {
        name
        for end in settings.targets
        for name in _inside(end, [name for name in names if ends_with(name, end)], other, model)
    }


def _inside(wanted: str, hits: Sequence[str], other: tuple[str, ...], model: Model, key: str = "targets") -> set[str]:
    """The hits in the language model, and those in parts whose name occurs in what was written."""
    part = {name: _part_of(name, other) for name in hits}
    kept = {name for name in hits if part[name] is None or str(part[name]).rsplit(".", 1)[-1] in wanted}
    if hits and not kept:
        parts = sorted({str(found) for found in part.values()})
        raise UserError(
            f"lora.{key}: '{wanted}' matches only outside the language model of {model.name}: in {', '.join(parts)}",
            "Other parts than the language model are adapted only if they are named.",
            f"Write a regular expression that names it, such as '{re.escape(parts[0])}\\..*', or correct lora.{key}.",
        )
    return kept


def _excluded(settings: LoraConfig, name: str) -> bool:
    if any(re.match(rf"(^|.*\.){re.escape(saved)}($|\..*)", name) for saved in settings.modules_to_save):
        return True
    if isinstance(settings.exclude, str):
        return re.fullmatch(settings.exclude, name) is not None
    return any(ends_with(name, end) for end in settings.exclude)


def layer_number(name: str, patterns: Sequence[str] = ()) -> int | None:
    """The number of the layer that a name lies in: the first number, or that after one of `patterns`."""
    lists = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for expression in lists if (match := re.match(expression, name))), None)
    return None if found is None else int(found.group(1))


def _in_layers(settings: LoraConfig, name: str) -> bool:
    return not settings.layers or layer_number(name, settings.layers_pattern) in settings.layers


def _parameters(settings: LoraConfig, model: Model, other: tuple[str, ...]) -> set[str]:
    names = [name for name, _ in model.module.named_parameters()]
    found = set()
    for end in settings.parameters:
        hits = _inside(end, [name for name in names if ends_with(name, end)], other, model, "parameters")
        kept = {name for name in hits if _in_layers(settings, name)}
        if not kept:
            raise UserError(
                f"lora.parameters: '{end}' lies in none of the layers {', '.join(map(str, settings.layers))}",
                "An adapter on nothing would train nothing.",
                "Correct lora.layers or lora.parameters.",
            )
        found |= kept
    return found


def _shortest(settings: LoraConfig, names: Sequence[str], kept: set[str]) -> tuple[str | list[str], bool]:
    """The first description that PEFT reads as exactly these modules; full names always do."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    ends = sorted({name.rsplit(".", 1)[-1] for name in kept})
    written = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
    for wanted in (ends if written == ALL_LINEAR else written, ends):
        layers = {"layers_to_transform": list(settings.layers), "layers_pattern": list(settings.layers_pattern) or None}
        config = PeftConfig(
            target_modules=wanted,
            exclude_modules=excluded(settings),
            modules_to_save=list(settings.modules_to_save) or None,
            **(layers if settings.layers else {}),
        )
        if {name for name in names if check_target_module_exists(config, name)} == kept:
            return wanted, bool(settings.layers)
    return sorted(kept), False


def excluded(settings: LoraConfig) -> str | list[str] | None:
    """The exclusions in PEFT's words."""
    return (settings.exclude if isinstance(settings.exclude, str) else list(settings.exclude)) or None


def _require_matches(settings: LoraConfig, model: Model, names: list[str]) -> None:
    stacked = [name for name, _ in model.module.named_parameters()]
    for key, known in (
        ("targets", names),
        ("exclude", names),
        ("modules_to_save", names),
        ("token_modules", names),
        ("parameters", stacked),
    ):
        written = getattr(settings, key)
        if isinstance(written, str):
            fits: Callable[[str, str], bool] = lambda name, wanted: re.fullmatch(wanted, name) is not None  # noqa: E731
            written = () if written in (ALL_LINEAR, "") else (written,)
        else:
            fits = ends_with
        for wanted in written:
            if not any(fits(name, wanted) for name in known):
                raise _matches_nothing(key, wanted, known, model)


def require_patterns(settings: LoraConfig, model: Model, targets: Targets) -> None:
    """Raise if a pattern of ranks or alphas matches nothing that is adapted (PEFT's rule of matching)."""
    adapted = [*targets.modules, *targets.parameters]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(settings, key):
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise _matches_nothing(key, pattern, sorted(adapted), model)


def _require_layers(settings: LoraConfig, model: Model, names: Sequence[str]) -> None:
    numbers = {number for name in names if (number := layer_number(f"{name}.", settings.layers_pattern)) is not None}
    if settings.layers and not numbers:
        raise _matches_nothing("layers_pattern", settings.layers_pattern[0], list(names), model)
    if settings.layers and max(settings.layers) > max(numbers):
        raise UserError(
            f"lora.layers holds {max(settings.layers)}, but {model.name} has layers 0 to {max(numbers)}",
            "Layers are counted from 0.",
            "Correct lora.layers.",
        )


def _matches_nothing(key: str, wanted: str, known: list[str], model: Model) -> UserError:
    ends = sorted({name.rsplit(".", 1)[-1] for name in known if not name.rsplit(".", 1)[-1].isdigit()})
    shown = linear_names(model.module) if key == "targets" else ends
    words = ["all-linear"] if key == "targets" else []
    close = did_you_mean(re.split(r"\\?\.", wanted)[-1], [*ends, *words])
    return UserError(
        f"lora.{key}: '{wanted}' matches nothing in {model.name}",
        close if close.startswith("Did") else "It would have no effect.",
        f"{'Linear layers' if key == 'targets' else 'Names'} of this model: {listed(shown)}.",
    )


def listed(names: Iterable[str]) -> str:
    """Names with the number of their layer left out, each once."""
    general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return ", ".join(general[:SHOWN]) + (f" and {len(general) - SHOWN} more" if len(general) > SHOWN else "")
