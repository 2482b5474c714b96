"""Putting the adapter into the model: layers are replaced in place, no wrapper, so parameters keep their names.

The base is frozen and keeps its data type; the adapter has its own, float32 by default. A target that matches
nothing, PEFT adapting something else than was asked for, and an adapter that leaves nothing to train are errors: each
would be a run that learns nothing, or something else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pegbox.errors import PluginError, UserError

from pegbox_lora.classifying import require_head, task_type, with_head
from pegbox_lora.config import ALL_LINEAR, FRESH, MEASURED, LoraConfig
from pegbox_lora.continued import load_weights, read_adapter
from pegbox_lora.disabling import switch_of
from pegbox_lora.initialization import take_from_base
from pegbox_lora.measured import Measured
from pegbox_lora.targets import Targets, excluded, linear_names, listed, require_patterns, resolve
from pegbox_lora.tokens import token_rows

if TYPE_CHECKING:
    import peft
    import torch
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Model
    from torch.nn import Module, Parameter

ADAPTER = "default"
MARKS = (".lora_", f".modules_to_save.{ADAPTER}.", ".trainable_tokens_delta.")
"""What occurs in the names of parameters that PEFT adds."""


def apply(ctx: Context, model: Model, train: Dataset | None) -> Model:
    """Add the adapter that the config describes, or the one it names, and freeze the rest.

    Args:
        train: rows of the training split, for initialisations that look at them.

    Raises:
        UserError: a target matches nothing, or PEFT cannot adapt what it matches.
    """
    settings, module = ctx.section(LoraConfig), model.module
    if settings.adapter is not None:
        continued = read_adapter(ctx, settings, model)
        _require_float32_biases(continued.config.bias, model)
        with _seeded(ctx), _explained(settings, model):
            _inject(continued.config, module)
        _set_dtype(settings, module)
        load_weights(continued, model, adapter_parameters(module))
    else:
        settings = with_head(settings, model)
        targets = resolve(settings, model)
        require_patterns(settings, model, targets)
        _require_own_weights(model, targets)
        _require_float32_biases(settings.bias, model)
        config = peft_config(ctx, settings, model, targets)
        with _seeded(ctx), _explained(settings, model):
            measured = Measured(ctx, settings, model, config) if settings.init in MEASURED else None
            if measured is not None:
                measured.measure(train, sorted(targets.modules), _embeddings(model))
            _inject(config, module)
            _set_dtype(settings, module)
            _require_as_asked(settings, model, targets)
            if measured is not None:
                measured.put_in()
            elif settings.init not in FRESH:
                take_from_base(ctx, settings.init, model)
    require_only_adapter(model)
    require_head(model)
    return replace(model, adapter="peft", without_adapter=switch_of(settings, module))


@contextmanager
def _seeded(ctx: Context) -> Iterator[None]:
    """Random numbers of the adapter come from the run's seed alone and shift no others."""
    import torch

    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(ctx.rng("lora/init").seed)
        yield


@contextmanager
def _explained(settings: LoraConfig, model: Model) -> Iterator[None]:
    linear = listed(linear_names(model.module))
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        wanted = f"lora.targets is {settings.targets!r}."
        raise UserError(
            f"PEFT cannot adapt {model.name}: {str(error).splitlines()[0]}",
            wanted if settings.adapter is None else f"lora.adapter is '{settings.adapter}'.",
            f"Linear layers of this model: {linear}. Name those to adapt in lora.targets, or others in lora.exclude.",
        ) from error


def peft_config(ctx: Context, settings: LoraConfig, model: Model, targets: Targets) -> peft.LoraConfig:
    """The same adapter in PEFT's words."""
    import peft

    by_name = sorted(targets.parameters) if settings.layers else list(settings.parameters)
    saved = _saved_modules(settings, model)
    return peft.LoraConfig(
        task_type=task_type(model),
        base_model_name_or_path=model.base,
        revision=ctx.config.run.model.revision,
        r=settings.r,
        lora_alpha=_whole(settings.alpha),
        rank_pattern=dict(settings.rank_pattern),
        alpha_pattern={pattern: _whole(alpha) for pattern, alpha in settings.alpha_pattern.items()},
        lora_dropout=settings.dropout,
        target_modules=targets.wanted or [],
        exclude_modules=excluded(settings),
        target_parameters=by_name or None,
        layers_to_transform=list(settings.layers) if targets.by_layer else None,
        layers_pattern=(list(settings.layers_pattern) or None) if targets.by_layer else None,
        modules_to_save=saved or None,
        ensure_weight_tying="tied_head" in model.traits
        and any(name.endswith(end) for name in _embeddings(model) for end in saved),
        trainable_token_indices=token_rows(ctx, settings, model) or None,
        bias=settings.bias,
        # What takes its factors out of the base is done afterwards, in float32; the exported adapter fits the base.
        init_lora_weights=settings.init if settings.init in ("gaussian", "orthogonal") else True,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
    )


def _whole(value: float) -> int:
    """An int where the value is one: servers read alpha as an integer; PEFT computes with either."""
    return int(value) if value.is_integer() else cast("int", value)


def _saved_modules(settings: LoraConfig, model: Model) -> list[str]:
    """As written, or by full name where PEFT, which compares the ends of names without a dot, would find others too."""
    names = [name for name, _ in model.module.named_modules() if name]
    saved: list[str] = []
    for end in settings.modules_to_save:
        meant = [name for name in names if name == end or name.endswith(f".{end}")]
        saved += [end] if meant == [name for name in names if name.endswith(end)] else meant
    return saved


def _embeddings(model: Model) -> list[str]:
    """Names of the input and output embeddings."""
    if not hasattr(model.module, "get_input_embeddings"):
        return []
    ends = (model.module.get_input_embeddings(), model.module.get_output_embeddings())
    return [name for name, part in model.module.named_modules() if any(part is end for end in ends)]


def _require_own_weights(model: Model, targets: Targets) -> None:
    """Raise if an adapted weight is shared: merging would then change the other user of it as well."""
    shared = sorted(targets.modules & set(_embeddings(model))) if "tied_head" in model.traits else []
    if shared:
        raise UserError(
            f"lora.targets names {shared[0]}, but in {model.name} the head and the input embeddings are one weight",
            "With a low-rank update on one of them, PEFT's merge changes both, so a merged model would differ.",
            "Take it out of lora.targets; train it in full with lora.modules_to_save, or rows of it with lora.tokens.",
        )


def _inject(config: peft.LoraConfig, module: Module) -> None:
    import peft

    add = getattr(module, "add_adapter", None)
    if add is None:
        peft.inject_adapter_in_model(config, module, ADAPTER)
        return
    base = config.base_model_name_or_path
    add(config, ADAPTER)
    config.base_model_name_or_path = base


def _require_float32_biases(bias: str, model: Model) -> None:
    kinds = {str(p.dtype).removeprefix("torch.") for p in model.module.parameters() if p.is_floating_point()}
    if bias != "none" and kinds != {"float32"}:
        raise UserError(
            f"lora.bias is '{bias}', but the base is in {', '.join(sorted(kinds))}",
            "Biases are part of the base's layers, and what is trained is in float32.",
            "Set model.dtype to float32, or lora.bias to none.",
        )


def adapter_parameters(module: Module) -> dict[str, Parameter]:
    """Parameters that the adapter brought: low-rank matrices, magnitudes, token rows, copies of modules to save."""
    return {name: p for name, p in module.named_parameters() if any(mark in name for mark in MARKS)}


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


def adapted_names(module: Module) -> tuple[set[str], set[str]]:
    """Full names of what PEFT gave an update of its own: modules, and stacked parameters."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    modules, parameters = set(), set()
    for name, part in module.named_modules():
        if isinstance(part, ParamWrapper):
            parameters.add(f"{name.replace('.base_layer', '')}.{part.parameter_name}")
        elif isinstance(part, LoraLayer):
            modules.add(name)
    return modules, parameters


def _require_as_asked(settings: LoraConfig, model: Model, targets: Targets) -> None:
    """Raise unless PEFT adapted what was resolved; for mixtures of experts it rewrites some targets."""
    modules, parameters = adapted_names(model.module)
    missing = sorted(targets.modules - modules | targets.parameters - parameters)
    extra = sorted(modules - targets.modules | parameters - targets.parameters)
    if not missing and not extra:
        return
    what = [f"left out {listed(missing)}"] * bool(missing) + [f"adapted {listed(extra)}"] * bool(extra)
    fit = sorted({name.rsplit(".", 1)[-1] for name in targets.modules & modules})
    raise UserError(
        f"PEFT read lora.targets differently for {model.name}: it {' and '.join(what)}",
        "For this mixture of experts it takes names of dense layers for those of experts of older checkpoints.",
        f"Set lora.targets to [{', '.join(fit)}]"
        + ("" if settings.targets != ALL_LINEAR else ", and name stacked experts in lora.parameters")
        + ".",
    )


def require_only_adapter(model: Model) -> None:
    """Raise unless the adapter's parameters, the biases it asked for, and nothing else are trained.

    Raises:
        PluginError: a part of the adapter is frozen, or a parameter of the base is trained.
    """
    own, bias = adapter_parameters(model.module), model.module.peft_config[ADAPTER].bias
    trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    if not own or not trained >= set(own):
        raise PluginError(
            f"the adapter left {len(own)} parameters in {model.name}, of which {len(trained & set(own))} are trained",
            "An adapter without trained parameters learns nothing.",
            "Remove the plugin that freezes them, or correct lora.targets.",
        )
    foreign = sorted(name for name in trained - set(own) if not (bias != "none" and name.endswith("bias")))
    if foreign:
        raise PluginError(
            f"{len(foreign)} parameters of the base are still trained: {listed(foreign)}",
            "Under an adapter the base is frozen.",
            "Remove the plugin that unfreezes them, or name their modules in lora.modules_to_save.",
        )
