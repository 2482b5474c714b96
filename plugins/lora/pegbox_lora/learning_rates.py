"""Learning rates within the adapter: LoRA+ (arXiv:2402.12354) trains the second matrices faster than the first.

Which parameters count as second follows PEFT's `create_loraplus_optimizer`: the B matrices, and vectors (magnitudes of
DoRA, trained biases).
"""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.types import GroupOptions

from pegbox_lora.config import LoraConfig

SECOND = r"\.lora_B\.|\.lora_magnitude_vector\.|(^|\.)bias$"
EMBEDDING = r"\.lora_embedding_[AB]\."


def group_options(settings: LoraConfig) -> Sequence[GroupOptions]:
    """The groups that the settings ask for."""
    groups = []
    if settings.lr_ratio is not None:
        groups.append(GroupOptions(pattern=SECOND, learning_rate_scale=settings.lr_ratio))
    if settings.embedding_lr is not None:
        groups.append(GroupOptions(pattern=EMBEDDING, learning_rate=settings.embedding_lr))
    return groups
