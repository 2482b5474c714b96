"""Training an adapter further: its folder, or that of the run that exported it, says rank, targets and all else.

What the config says about the adapter's shape must agree with it; nothing is silently replaced.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, UserError

from pegbox_lora.config import LoraConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    import peft
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Parameter

CONFIG, RECORD = "adapter_config.json", "run.json"
PREFIX = "base_model.model."
SHOWN = 3
SAME = {
    "r": "r",
    "alpha": "lora_alpha",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
    "bias": "bias",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Settings that the adapter has of its own, by their names in PEFT."""


@dataclass(frozen=True)
class Continued:
    """An adapter to go on with: its folder and what it is."""

    folder: Path
    config: peft.LoraConfig


def read_adapter(ctx: Context, settings: LoraConfig, model: Model) -> Continued:
    """Read what the adapter is, made ready to be trained.

    Raises:
        UserError: it is not there, is no low-rank adapter, or only fits a base that its initialisation changed.
        ConfigError: the config says otherwise about its shape.
    """
    import peft

    folder = ctx.config.path(str(settings.adapter))
    if not (folder / CONFIG).is_file():
        unfinished = (folder / RECORD).is_file()
        raise UserError(
            f"lora.adapter is '{settings.adapter}', but {folder} holds no {CONFIG}",
            "A run exports its adapter when training ends." if unfinished else "An adapter's folder has one.",
            "Finish that run (resume=auto), or correct lora.adapter.",
        )
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise UserError(
            f"lora.adapter is '{settings.adapter}', which is a {config.peft_type} adapter",
            "This plugin trains low-rank adapters.",
            "Name the folder of a LoRA adapter.",
        )
    if str(config.init_lora_weights).startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(
            f"the adapter {settings.adapter} was saved as '{config.init_lora_weights}': it fits a changed base only",
            "Its first factors were taken out of the base, and are not with it.",
            "Save it in PEFT with path_initial_model_for_weight_conversion, then name that folder.",
        )
    if config.layer_replication:
        raise UserError(
            f"the adapter {settings.adapter} repeats layers of its base (layer_replication)",
            "The copies share one weight, so PEFT cannot merge what they learn.",
            "Train an adapter on the base as it is.",
        )
    _require_agreement(settings, config)
    config.inference_mode = False
    config.base_model_name_or_path, config.revision = model.base, ctx.config.run.model.revision
    config.lora_dropout = settings.dropout if "dropout" in _given(settings) else config.lora_dropout
    return Continued(folder, config)


def load_weights(continued: Continued, model: Model, own: Mapping[str, Parameter]) -> None:
    """Put the adapter's weights into the layers that were made for them.

    Raises:
        UserError: one is missing, unknown, or of another shape.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    if next(model.module.parameters()).device.type == "meta":
        return
    try:
        saved = load_peft_weights(str(continued.folder), device="cpu")
        bare = {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()}
        found = set_peft_model_state_dict(model.module, bare)
    except (RuntimeError, KeyError) as error:
        raise _unlike(continued, model, str(error).splitlines()[-1].strip()) from error
    unlike = sorted(set(found.missing_keys) & own.keys()) + sorted(found.unexpected_keys)
    if unlike:
        more = f" and {len(unlike) - SHOWN} more" if len(unlike) > SHOWN else ""
        raise _unlike(continued, model, f"{', '.join(unlike[:SHOWN])}{more} are on one side only")


def _unlike(continued: Continued, model: Model, how: str) -> UserError:
    return UserError(
        f"the adapter in {continued.folder} does not fit {model.name}: {how}",
        "It was trained on another base model.",
        "Set model.name to the model it was trained on.",
    )


def _given(settings: LoraConfig) -> set[str]:
    """Settings that the config gives. A config that names every one was written by a run, defaults included."""
    given = set(settings.model_fields_set)
    if given != set(LoraConfig.model_fields):
        return given
    return {name for name, field in LoraConfig.model_fields.items() if getattr(settings, name) != field.default}


def _require_agreement(settings: LoraConfig, config: peft.LoraConfig) -> None:
    given = _given(settings)
    for name, theirs in SAME.items():
        own, its = _plain(getattr(settings, name)), _plain(getattr(config, theirs))
        if name in given and own != its:
            raise ConfigError(
                f"lora.{name} is {getattr(settings, name)!r}, but the adapter {settings.adapter} has "
                f"{getattr(config, theirs)!r}",
                "An adapter that is trained further keeps its own shape.",
                f"Remove lora.{name}, or remove lora.adapter to begin a new adapter.",
            )
    for name in ("init", "tokens", "token_modules"):
        if name in given:
            raise ConfigError(
                f"lora.{name} is set, but the adapter {settings.adapter} brings its own",
                "An adapter that is trained further keeps its weights and token rows.",
                f"Remove lora.{name}.",
            )


def _plain(value: Any) -> Any:
    """A value that compares: sets and lists of names sorted, nothing as nothing."""
    if isinstance(value, set | list | tuple):
        items = [list(item) if isinstance(item, tuple | list) else item for item in value]
        return sorted(items) or None
    return value or None
