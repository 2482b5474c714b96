"""The section `gpt-oss-attention` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting

Wanted = Literal["auto", "flash-attn-4", "pegbox", "flex", "eager"]


class GptOssAttentionConfig(Section):
    """Which kernels compute attention with sinks."""

    backend: Wanted = setting(
        "auto",
        "Kernels of all layers; `auto`: the first that can of `flash-attn-4`, `pegbox`, `flex`, `eager`; for window "
        "layers of `pegbox`, `flash-attn-4`, `flex`, `eager`.",
    )
    window_backend: Wanted | None = setting(None, "Kernels of layers with a sliding window, if not as `backend` says.")
    deterministic: bool = setting(
        False,
        "The same bits each time, on any GPU; otherwise the fastest way, which may sum gradients in any order.",
    )

    def wanted(self, kind: Literal["full", "window"]) -> Wanted:
        """What is asked for a kind of layers."""
        return self.backend if kind == "full" or self.window_backend is None else self.window_backend
