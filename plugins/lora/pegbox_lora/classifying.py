"""Adapters on a model that classifies: its head is trained whole and kept with the adapter.

A head that begins as random numbers would stay random under an adapter beside it. PEFT calls such adapters `SEQ_CLS`
and `TOKEN_CLS`, and keeps the head among the modules that are saved whole (`modules_to_save`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_lora.config import MEASURED

if TYPE_CHECKING:
    from pegbox.types import Model

    from pegbox_lora.config import LoraConfig

CLASSIFIER, OF_TOKENS = "classifier", "token_classifier"
"""Traits of models that have a classifying head."""


def task_type(model: Model) -> str:
    """What the model does, in PEFT's words."""
    if CLASSIFIER not in model.traits:
        return "CAUSAL_LM"
    return "TOKEN_CLS" if OF_TOKENS in model.traits else "SEQ_CLS"


def head_names(model: Model) -> list[str]:
    """Names of what a classifying model has beside its trunk; of other models nothing."""
    if CLASSIFIER not in model.traits:
        return []
    inner = model.module.base_model
    parts = model.module.named_children()
    return [name for name, part in parts if part is not inner and next(part.parameters(), None) is not None]


def with_head(settings: LoraConfig, model: Model) -> LoraConfig:
    """The settings with the head among the modules that are trained whole.

    Raises:
        UserError: the adapter is to begin with what the model does to predict the next token.
    """
    if CLASSIFIER in model.traits and settings.init in MEASURED:
        raise UserError(
            f"lora.init is '{settings.init}', and {model.name} classifies",
            "It begins with what the model does to predict the next token of training rows.",
            "Set lora.init to default, orthogonal or pissa.",
        )
    new = [name for name in head_names(model) if name not in settings.modules_to_save]
    return settings.model_copy(update={"modules_to_save": (*settings.modules_to_save, *new)}) if new else settings


def require_head(model: Model) -> None:
    """Raise unless the head is trained.

    Raises:
        UserError: an adapter that is trained further was made for a model without this head.
    """
    for name in head_names(model):
        if not any(parameter.requires_grad for parameter in model.module.get_submodule(name).parameters()):
            raise UserError(
                f"the adapter does not hold the head of {model.name}, '{name}'",
                "The head would stay as it began.",
                "Remove lora.adapter to begin a new adapter, or name one that was trained with this head.",
            )
