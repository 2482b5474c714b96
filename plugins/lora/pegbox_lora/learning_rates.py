"""Learning rates within the adapter: LoRA+ (arXiv:2402.12354) trains the second matrices faster than the first.

Which parameters count as second follows PEFT's `create_loraplus_optimizer`: the B matrices, and vectors (magnitudes of
DoRA, trained biases).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.errors import ConfigError
from pegbox.types import GroupOptions

from pegbox_lora.config import LoraConfig

if TYPE_CHECKING:
    from pegbox.types import Model

SECOND = r"\.lora_B\.|\.lora_magnitude_vector\.|(^|\.)bias$"
EMBEDDING = r"\.lora_embedding_[AB]\."


def group_options(settings: LoraConfig, model: Model) -> Sequence[GroupOptions]:
    """The groups that the settings ask for.

    Raises:
        ConfigError: a learning rate for adapters on embeddings, and there are none.
    """
    groups = []
    if settings.lr_ratio is not None:
        groups.append(GroupOptions(pattern=SECOND, learning_rate_scale=settings.lr_ratio))
    if settings.embedding_lr is not None:
        if not any(re.search(EMBEDDING, name) for name, _ in model.module.named_parameters()):
            raise ConfigError(
                f"lora.embedding_lr is set, but no adapter is on an embedding of {model.name}",
                "The setting would do nothing.",
                "Remove it, or name the embeddings in lora.targets, such as embed_tokens.",
            )
        groups.append(GroupOptions(pattern=EMBEDDING, learning_rate=settings.embedding_lr))
    return groups
