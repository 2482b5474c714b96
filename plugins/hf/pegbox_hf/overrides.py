"""Fields of a model's own config that a run changes: `hf.config_overrides` and `hf.rope_scaling`.

A config of transformers takes any name and keeps it, so a misspelt one would be a setting without effect; here only
fields that the model's config has may be changed. Mappings are merged, so `{rope_parameters: {factor: 4.0}}` changes
one number. Rotary scaling is checked by transformers' own rules, whose warnings are errors here.

`rope_scaling` is the older name of `rope_parameters`, which holds the base `rope_theta` too: the base is kept unless
it is given. Models with one scaling per kind of layer take it for each kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, did_you_mean

from pegbox_hf.config import HfConfig

if TYPE_CHECKING:
    from pegbox.context import Context
    from transformers import PretrainedConfig

ELSEWHERE = {
    "dtype": "model.dtype or hf.trainable_dtype",
    "torch_dtype": "model.dtype or hf.trainable_dtype",
    "attn_implementation": "hf.attention",
    "quantization_config": "the plugin that quantizes (bnb)",
    "vocab_size": "hf.new_tokens",
}
FIXED = frozenset({"model_type", "architectures", "auto_map", "transformers_version"})
ADVICE = ("The explicitly set RoPE scaling factor", "This model config has set a")
"""How messages begin that are no mistakes of the one who wrote the scaling."""
PRETRAINED_LENGTH = ("llama3", "yarn", "longrope")
"""Scalings that need to know how long rows were in pretraining."""
ROPE = ("rope_scaling", "rope_parameters")


def override(ctx: Context, name: str, config: PretrainedConfig) -> PretrainedConfig:
    """The config of the run's model with what the run changes; another model's as it is.

    Raises:
        ConfigError: no such field, a field that is set elsewhere, or a scaling that transformers does not take.
    """
    settings = ctx.section(HfConfig)
    if name != ctx.config.run.model.name or not (settings.config_overrides or settings.rope_scaling):
        return config
    changes = dict(settings.config_overrides)
    scaling: list[tuple[str, object]] = [("hf.rope_scaling", settings.rope_scaling)] if settings.rope_scaling else []
    scaling += [(f"hf.config_overrides.{key}", changes.pop(key)) for key in ROPE if key in changes]
    if len(scaling) > 1:
        raise ConfigError(
            f"rotary positions are scaled twice: {' and '.join(key for key, _ in scaling)}",
            "They are one setting under two names.",
            "Remove one of them.",
        )
    pretrained = getattr(config.get_text_config(), "max_position_embeddings", None)
    _change(config, changes, "hf.config_overrides")
    for key, value in scaling:
        _scale(config.get_text_config(), value, key, pretrained)
    return config


def _change(config: PretrainedConfig, changes: Mapping[str, object], key: str) -> None:
    known = {*config.to_dict(), *config.attribute_map}
    for name, value in changes.items():
        if name in ELSEWHERE:
            raise ConfigError(f"{key}.{name} is set elsewhere", "One setting has one place.", f"Use {ELSEWHERE[name]}.")
        if name in FIXED or name.startswith("_") or name not in known:
            raise ConfigError(
                f"{key}: the config of model type '{config.model_type}' has no field '{name}' that may be changed",
                did_you_mean(name, {field for field in known if not field.startswith("_")} - FIXED, "Its fields:"),
                f"Correct or remove {key}.{name}.",
            )
        old = getattr(config, name)
        if isinstance(value, Mapping) and hasattr(old, "to_dict"):
            _change(old, value, f"{key}.{name}")
            continue
        merged = {**old, **value} if isinstance(value, Mapping) and isinstance(old, Mapping) else value
        try:
            setattr(config, name, merged)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{key}.{name} cannot be {value!r}: {str(error).splitlines()[0]}",
                f"The model's own value is {old!r}.",
                f"Correct {key}.{name}.",
            ) from error


def _scale(config: PretrainedConfig, value: object, key: str, pretrained: int | None) -> None:
    old = getattr(config, "rope_parameters", None)
    if not isinstance(value, Mapping) or old is None:
        raise ConfigError(
            f"{key} is {value!r}, but the model type '{config.model_type}' has "
            f"{'no rotary positions' if old is None else 'rotary positions that take a mapping'}",
            "Only rotary positions can be scaled.",
            f"Remove {key}." if old is None else "Write a mapping such as {rope_type: yarn, factor: 4.0}.",
        )
    given = {("rope_type" if name == "type" else name): inner for name, inner in value.items()}
    if given.get("rope_type") in PRETRAINED_LENGTH and pretrained is not None:
        given.setdefault("original_max_position_embeddings", pretrained)
    by_layer = {kind: inner for kind, inner in old.items() if isinstance(inner, dict)}
    new = {kind: _merged(inner, given) for kind, inner in by_layer.items()} if by_layer else _merged(old, given)
    _require_known(config, given, key)
    config.rope_parameters = new
    config.standardize_rope_params()
    problems = _problems(config)
    if problems:
        raise ConfigError(
            f"{key} does not fit: {problems[0]}",
            "transformers says so.",
            f"Correct {key}.",
        )


def _merged(old: Mapping[str, object], given: Mapping[str, object]) -> dict[str, object]:
    """The new scaling; of the old one the base and the share of rotated dimensions stay."""
    kept = {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in old}
    if given.get("rope_type", old.get("rope_type")) == old.get("rope_type"):
        kept = dict(old)
    return {**kept, **given}


def _require_known(config: PretrainedConfig, given: Mapping[str, object], key: str) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = given.get("rope_type")
    known = {"default", *ROPE_INIT_FUNCTIONS}
    if kind is not None and kind not in known:
        raise ConfigError(
            f"{key}.rope_type is {kind!r}, which transformers does not know",
            did_you_mean(str(kind), known, "It knows:"),
            f"Correct {key}.rope_type.",
        )


def _problems(config: PretrainedConfig) -> list[str]:
    """What transformers' own check of the rotary positions says; most of it only as log messages."""
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger = logging.getLogger("transformers.modeling_rope_utils")
    listener, level = Listener(logging.WARNING), logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.WARNING)
    try:
        config.validate_rope()
    except (KeyError, ValueError, TypeError) as error:
        said.append(str(error))
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
    return [line for line in said if not line.startswith(ADVICE)]
