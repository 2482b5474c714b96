"""Putting the adapter into the model: layers are replaced in place, no wrapper, so parameters keep their names.

The base is frozen and keeps its data type; the adapter has its own, float32 by default. A target that matches
nothing, and an adapter that leaves nothing to train, are errors: both would be a run that learns nothing.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pegbox.errors import UserError, did_you_mean

from pegbox_lora.config import ALL_LINEAR, LoraConfig

if TYPE_CHECKING:
    import peft
    import torch
    from pegbox.context import Context
    from pegbox.types import Model
    from torch.nn import Module, Parameter

ADAPTER = "default"
SHOWN = 12


def apply(ctx: Context, model: Model) -> Model:
    """Add the adapter that the config describes and freeze the rest.

    Raises:
        UserError: a target matches nothing, or PEFT cannot adapt what it matches.
    """
    import torch

    settings, module = ctx.section(LoraConfig), model.module
    _require_targets(settings, model)
    _require_float32_biases(settings, model)
    config = peft_config(settings, model, ctx.config.run.model.revision)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(ctx.rng("lora/init").seed)
        try:
            _inject(config, module)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"PEFT cannot adapt {model.name}: {str(error).splitlines()[0]}",
                f"lora.targets is {settings.targets!r}.",
                f"Linear layers of this model: {_listed(linear_names(module))}.",
            ) from error
    _set_dtype(settings, module)
    _require_adapter(settings, model)
    return replace(model, adapter="peft")


def peft_config(settings: LoraConfig, model: Model, revision: str | None) -> peft.LoraConfig:
    """The same adapter in PEFT's words."""
    import peft

    targets = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
    if settings.layers and targets == ALL_LINEAR:
        targets = sorted({name.rsplit(".", 1)[-1] for name in linear_names(model.module)})
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.base,
        revision=revision,
        r=settings.r,
        lora_alpha=_whole(settings.alpha),
        lora_dropout=settings.dropout,
        target_modules=targets or [],
        exclude_modules=list(settings.exclude) or None,
        target_parameters=list(settings.parameters) or None,
        layers_to_transform=list(settings.layers) or None,
        modules_to_save=list(settings.modules_to_save) or None,
        ensure_weight_tying=bool(settings.modules_to_save) and "tied_head" in model.traits,
        bias=settings.bias,
        init_lora_weights=True if settings.init == "default" else settings.init,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def _whole(value: float) -> int:
    """An int where the value is one: servers read alpha as an integer; PEFT computes with either."""
    return int(value) if value.is_integer() else cast("int", value)


def _inject(config: peft.LoraConfig, module: Module) -> None:
    import peft

    add = getattr(module, "add_adapter", None)
    if add is None:
        peft.inject_adapter_in_model(config, module, ADAPTER)
        return
    base = config.base_model_name_or_path
    add(config, ADAPTER)
    config.base_model_name_or_path = base


def linear_names(module: Module) -> list[str]:
    """Names of all linear layers but the head."""
    from torch.nn import Linear

    head = getattr(module, "get_output_embeddings", lambda: None)()
    kinds = (Linear, *_other_linear())
    return [name for name, layer in module.named_modules() if isinstance(layer, kinds) and layer is not head]


def _other_linear() -> tuple[type, ...]:
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        return ()
    return (Conv1D,)


def _require_targets(settings: LoraConfig, model: Model) -> None:
    names = [name for name, _ in model.module.named_modules() if name]
    stacked = [name for name, _ in model.module.named_parameters()]
    for key, wanted, known in (
        ("targets", settings.targets if isinstance(settings.targets, tuple) else (), names),
        ("exclude", settings.exclude, names),
        ("modules_to_save", settings.modules_to_save, names),
        ("parameters", settings.parameters, stacked),
    ):
        for name in wanted:
            if not any(found == name or found.endswith(f".{name}") for found in known):
                raise _matches_nothing(key, name, known, model)
    expression = settings.targets if isinstance(settings.targets, str) and settings.targets != ALL_LINEAR else None
    if expression and not any(re.fullmatch(expression, name) for name in names):
        raise _matches_nothing("targets", expression, names, model)
    count = len({match.group(1) for name in names if (match := re.search(r"\.(\d+)\.", f".{name}."))})
    if settings.layers and max(settings.layers) >= count:
        raise UserError(
            f"lora.layers holds {max(settings.layers)}, but {model.name} has layers 0 to {count - 1}",
            "Layers are counted from 0.",
            "Correct lora.layers.",
        )


def _require_float32_biases(settings: LoraConfig, model: Model) -> None:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.module.parameters() if p.is_floating_point()}
    if settings.bias != "none" and kinds != {"float32"}:
        raise UserError(
            f"lora.bias is '{settings.bias}', but the base is in {', '.join(sorted(kinds))}",
            "Biases are part of the base's layers, and what is trained is in float32.",
            "Set model.dtype to float32, or lora.bias to none.",
        )


def _matches_nothing(key: str, wanted: str, known: list[str], model: Model) -> UserError:
    ends = sorted({name.rsplit(".", 1)[-1] for name in known if not name.rsplit(".", 1)[-1].isdigit()})
    shown = linear_names(model.module) if key == "targets" else ends
    return UserError(
        f"lora.{key}: '{wanted}' matches nothing in {model.name}",
        did_you_mean(wanted.rsplit(".", 1)[-1], ends) or "An adapter on nothing would train nothing.",
        f"{'Linear layers' if key == 'targets' else 'Names'} of this model: {_listed(shown)}.",
    )


def _listed(names: Iterable[str]) -> str:
    """Names with the number of their layer left out, each once."""
    general = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    return ", ".join(general[:SHOWN]) + (f" and {len(general) - SHOWN} more" if len(general) > SHOWN else "")


def adapter_parameters(module: Module) -> dict[str, Parameter]:
    """Parameters that the adapter brought: low-rank matrices, magnitudes, and copies of modules to save."""
    marks = (".lora_", f".modules_to_save.{ADAPTER}.", f".token_adapter.{ADAPTER}.")
    return {name: p for name, p in module.named_parameters() if any(mark in name for mark in marks)}


def _set_dtype(settings: LoraConfig, module: Module) -> None:
    import torch
    from peft.utils import ModulesToSaveWrapper

    dtype = getattr(torch, settings.dtype)
    for parameter in adapter_parameters(module).values():
        parameter.data = parameter.data.to(dtype)
    for wrapper in module.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            base = next(wrapper.original_module.parameters()).dtype
            wrapper.modules_to_save[ADAPTER].register_forward_pre_hook(_casting(dtype))
            wrapper.modules_to_save[ADAPTER].register_forward_hook(_casting(base))


def _casting(dtype: torch.dtype) -> Callable[..., Any]:
    """A hook that casts what goes into a module, or comes out of it: PEFT does so for low-rank layers only."""

    def cast(_: Module, *values: Any) -> Any:
        last = values[-1]
        if isinstance(last, tuple):
            return tuple(value.to(dtype) if value.is_floating_point() else value for value in last)
        return last.to(dtype)

    return cast


def _require_adapter(settings: LoraConfig, model: Model) -> None:
    own = adapter_parameters(model.module)
    trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    if not own or not trained >= set(own):
        raise UserError(
            f"the adapter left {len(own)} parameters in {model.name}, of which {len(trained & set(own))} are trained",
            "An adapter without trained parameters learns nothing.",
            "Correct lora.targets.",
        )
    foreign = sorted(name for name in trained - set(own) if not (settings.bias != "none" and name.endswith("bias")))
    if foreign:
        raise UserError(
            f"{len(foreign)} parameters of the base are still trained: {foreign[0]}",
            "Under an adapter the base is frozen.",
            "Remove the plugin that unfreezes them.",
        )
