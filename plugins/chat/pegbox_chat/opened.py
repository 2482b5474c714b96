"""A model ready to write: loaded through the hooks of the engine, on the device at hand."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.plan import compose
from pegbox.render import log_to_terminal
from pegbox.types import ModelOptions, ModelRequest

from pegbox_chat.runs import config_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class OpenModel:
    """A loaded model and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad_id: int

    @property
    def limit(self) -> int | None:
        """Tokens that the model reads at most, if it says so."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)


def open_model(name: str) -> OpenModel:
    """Load a run, a merged folder, an adapter on its base, or any model.

    Raises:
        UserError: there is no such model, or the run was not exported.
    """
    ctx = compose(config_for(name))
    log_to_terminal(0)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    device = best_device()
    options = ModelOptions(dtype="float32" if device == "cpu" else None)
    wanted = ctx.config.run.model
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    request = ModelRequest(name=wanted.name, format=wanted.format, role="reference", options=options)
    model = ctx.call(hooks.load_model, ctx, request)
    return OpenModel(model.module.to(device).eval(), ctx.processor.tokenizer, ctx.processor.pad_id)


def best_device() -> str:
    """The accelerator if there is one. On a CPU, where half precision is emulated, models run in float32."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
