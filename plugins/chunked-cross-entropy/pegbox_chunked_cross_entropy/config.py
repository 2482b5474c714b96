"""The section `chunked-cross-entropy` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class ChunkedCrossEntropyConfig(Section):
    """How large the chunks are."""

    chunk: int = setting(
        1024,
        "Trained tokens whose logits are in memory at once; 1024 of a vocabulary of 128k are 0.5 GiB.",
        unit="tokens",
        ge=1,
    )
