"""Classifying models: in place of the next token they predict C numbers, for a sequence or for each token.

They are the models of `AutoModelForSequenceClassification` and `AutoModelForTokenClassification`: a trunk and one
projection. The projection runs over all tokens, so that a loss may read a prediction wherever it wants one; for a
sequence that is its last token, as in transformers. It computes in float32 and its weights are float32, whatever the
trunk's data type: it is a few numbers, and differences of rewards are small beside their size.

transformers' sequence classifiers take for the last token the rightmost one that is not `pad_token_id`. So the config
names the id that pads the run's rows, and the tokenizer names its token, or what is exported would score padded batches
elsewhere than it was trained.

    B  rows    T  tokens    H  hidden size    C  labels
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.rows import Batch
from pegbox.types import ModelOptions, Need, Outputs

from pegbox_hf.forward import FROM_TRUNK, bare, router_logits_of, run_trunk
from pegbox_hf.head import made_up_hidden, own_logits

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import ModelRequest, Processor
    from torch.nn import Module
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    from pegbox_hf.opening import Opened

FAMILIES = {None: "CausalLM", "sequence": "SequenceClassification", "token": "TokenClassification"}
CLASSIFIER, OF_TOKENS = "classifier", "token_classifier"
"""Traits: the model classifies; what it classifies is tokens."""
DROPOUTS = ("classifier_dropout", "hidden_dropout")
LEFT_ALONE = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Where requests to quantize name modules that keep their values."""
FIRST_SPREAD = 0.02
"""Standard deviation of a new head where the config has no `initializer_range`."""


def auto_class(options: ModelOptions) -> type[_BaseAutoModelClass]:
    """The class of transformers that opens what is asked for."""
    import transformers

    found: type[_BaseAutoModelClass] = getattr(transformers, f"AutoModelFor{FAMILIES[options.classify]}")
    return found


def require_classifier(opened: Opened, request: ModelRequest) -> None:
    """Raise unless the model can be opened with the head that is asked for.

    Raises:
        UserError: it has a head of another size, or transformers has no such class for it.
        ConfigError: only its text part was asked for.
    """
    family, config, labels = FAMILIES[request.options.classify], opened.config, request.options.labels
    if labels is None or labels < 1:
        raise UserError(
            f"a classifying head of {labels} labels is asked for",
            "A head predicts one number or more.",
            "Fix the plugin whose configure_model asks for it: ModelOptions.labels.",
        )
    if opened.whole is not None:
        raise ConfigError(
            f"hf.text_only is set, and '{request.name}' is to be opened with a classifying head",
            "The text part is taken out of a model that predicts the next token.",
            "Remove hf.text_only, or use a model of text.",
        )
    own_code = f"AutoModelFor{family}" in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class(request.options)._model_mapping and not own_code:
        raise UserError(
            f"transformers has no {family} for the model type '{config.model_type}' of '{request.name}'",
            f"A plugin asks for a model that classifies each {request.options.classify}.",
            "Set model.name to a model of another type.",
        )
    stored = [name for name in config.architectures or () if name.endswith(f"For{family}")]
    if stored and config.num_labels != labels:
        raise UserError(
            f"'{request.name}' is a {stored[0]} that predicts {config.num_labels} numbers, and {labels} are asked for",
            "Its head cannot be cut or grown.",
            "Set model.name to its base model, or to a classifier of that size.",
        )


def asked_config(config: PretrainedConfig, options: ModelOptions) -> PretrainedConfig:
    """The config with the head that is asked for; one that classifies nothing stays as it is.

    Where a config says nothing, transformers drops a tenth of what goes into the head of a token classifier; here
    nothing is dropped then, so that a result does not depend on how a step is split.
    """
    if options.classify is None:
        return config
    config = copy.deepcopy(config)
    config.num_labels = options.labels
    if all(getattr(config, name, None) is None for name in DROPOUTS):
        config.classifier_dropout = 0.0
    return config


def head_name(network: PreTrainedModel) -> str:
    """The name of the projection: what has parameters and is not of the trunk.

    Raises:
        UserError: the head is more than that.
    """
    inner = network.base_model
    parts = network.named_children()
    beside = [name for name, part in parts if part is not inner and next(part.parameters(), None) is not None]
    if inner is network or len(beside) != 1:
        raise _unknown_head(network, f"beside its trunk it has {', '.join(beside) or 'nothing'}")
    return beside[0]


def sparing_head(quantization: object, network: PreTrainedModel) -> object:
    """The request to quantize weights with the head left out: it is trained, or computes what is compared.

    Args:
        quantization: a quantization config of transformers; it stays as it is.
        network: the shape of what is quantized.
    """
    field = next((name for name in LEFT_ALONE if hasattr(quantization, name)), None)
    if field is None:
        return quantization
    changed = copy.deepcopy(quantization)
    setattr(changed, field, [*(getattr(quantization, field) or ()), head_name(network)])
    return changed


def finish_head(ctx: Context, request: ModelRequest, network: PreTrainedModel, missing: Iterable[str]) -> list[str]:
    """Make the head ready: float32, and new where the checkpoint has none.

    Args:
        ctx: the source of a new head's first weights.
        request: what is opened.
        network: as transformers opened it.
        missing: names of weights that the checkpoint lacks.

    Returns:
        The names among these that are not of a new head.

    Raises:
        UserError: the head is quantized, or does something that is not known here.
    """
    name, rest = head_name(network), set(missing)
    head = network.get_submodule(name)
    weights = {f"{name}.{part}": weight for part, weight in head.named_parameters()}
    if not all(weight.is_floating_point() for weight in weights.values()):
        raise _unknown_head(network, "its weights are quantized")
    head.float()
    meta = any(weight.is_meta for weight in weights.values())
    if not meta and weights.keys() <= rest:
        rest -= weights.keys()
        _begin(ctx, network, head)
    if not meta:
        _require_projection(network, head, request)
    return sorted(rest)


def _begin(ctx: Context, network: PreTrainedModel, head: Module) -> None:
    """First weights: a normal draw from the run's seed alone; biases are zero."""
    spread = getattr(network.config.get_text_config(), "initializer_range", None) or FIRST_SPREAD
    generator = torch.Generator().manual_seed(ctx.rng("hf/head").seed)
    with torch.no_grad():
        for weight in head.parameters():
            weight.zero_()
            if weight.ndim > 1:
                weight.copy_(spread * torch.randn(weight.shape, generator=generator))


def _require_projection(network: PreTrainedModel, head: Module, request: ModelRequest) -> None:
    """Raise unless the network's own forward gives what the projection gives, for made-up hidden states."""
    hidden_NH = made_up_hidden(head)
    token = 1 if network.config.get_text_config().pad_token_id == 0 else 0
    with torch.no_grad():
        own, plain_NC = own_logits(network, hidden_NH, token), head(hidden_NH)
    expected = plain_NC[-1] if request.options.classify == "sequence" else plain_NC
    if own.shape != expected.shape or not torch.allclose(own, expected, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
        raise _unknown_head(network, "its own forward and the projection alone give different predictions")


def _unknown_head(network: PreTrainedModel, what: str) -> UserError:
    return UserError(
        f"the head of {type(network).__name__} is not known here: {what}",
        "A classifying head is one projection of the last hidden states, in full precision.",
        "Use another model, or a plugin that loads this one.",
    )


def require_trained_head(request: ModelRequest, network: PreTrainedModel, missing: Iterable[str]) -> None:
    """Raise if a second model's head would be random numbers: neither its weights nor its adapter hold one.

    Raises:
        UserError: naming the head.
    """
    name = head_name(network)
    in_adapter = hasattr(network.get_submodule(name), "modules_to_save")
    lacking = [weight for weight in missing if weight.startswith(f"{name}.")]
    if request.role != "policy" and lacking and not in_adapter:
        raise UserError(
            f"'{request.name}' has no head that was trained: it lacks {', '.join(sorted(lacking))}",
            f"As a {request.role} model its predictions would be random numbers.",
            "Name a model that was trained to classify, such as the folder of a run with reward or prm.",
        )


def name_padding(network: PreTrainedModel, processor: Processor) -> None:
    """Have config and tokenizer name what pads rows, so that transformers finds the last token of a padded row."""
    tokenizer, config = processor.tokenizer, network.config
    for part in (config, config.get_text_config()):
        part.pad_token_id = processor.pad_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(processor.pad_id)


def compute_values(module: Module, batch: Batch, needs: frozenset[Need]) -> Outputs:
    """Run one forward of a classifying model and return what was asked for.

    Args:
        module: a classifying model of transformers, bare or inside a PEFT wrapper.
        batch: tokens, plain or packed.
        needs: some of `values`, `hidden`, `router_logits`.

    Returns:
        `values_BTC` in float32: what the head predicts from the last hidden state of each token.

    Raises:
        RunError: an output that a classifying model does not have, or packed documents that see each other.
        UserError: rows are packed, and the model cannot keep documents apart.
    """
    unknown = needs - FROM_TRUNK - {"values"}
    if unknown:
        raise RunError(
            f"the loss needs {', '.join(sorted(unknown))}, which a classifying model does not return",
            f"It predicts numbers, not tokens; it returns {', '.join(sorted(FROM_TRUNK | {'values'}))}.",
            "Use another loss, or remove the plugin that asks for a classifying head.",
        )
    network = bare(module)
    returned = run_trunk(network, batch, router_logits="router_logits" in needs)
    hidden_BTH = returned.last_hidden_state
    return Outputs(
        values_BTC=_values(network, hidden_BTH) if "values" in needs else None,
        hidden_BTH=hidden_BTH if "hidden" in needs else None,
        router_logits=router_logits_of(network, returned) if "router_logits" in needs else None,
    )


def _values(network: PreTrainedModel, hidden_BTH: torch.Tensor) -> torch.Tensor:
    """The head, dropout before it included, outside of autocast."""
    with torch.autocast(hidden_BTH.device.type, enabled=False):
        inputs_BTH = hidden_BTH.float()
        for part in network.children():
            if isinstance(part, torch.nn.Dropout):
                inputs_BTH = part(inputs_BTH)
        values_BTC: torch.Tensor = network.get_submodule(head_name(network))(inputs_BTH)
    return values_BTC.float()
