"""The section `attention` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class AttentionConfig(Section):
    """Which implementation computes attention."""

    implementation: str = setting(
        ...,
        "`sdpa`, `eager`, `flex`, `flash-attn-4` or `pegbox`, each proven here; any other name is handed to "
        "transformers as it stands, such as `flash_attention_2` or `kernels-community/flash-attn3`, and is unproven.",
        min_length=1,
    )
    deterministic: bool = setting(
        False, "The same bits each time, also where a backward has a faster way whose order of sums is not fixed."
    )
