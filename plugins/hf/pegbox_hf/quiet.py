"""Keeping transformers' progress bars and advice off the terminal while Pegbox speaks for itself."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NEIGHBOURS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Libraries that transformers and peft import wherever they are installed, and that then tell of kernels they lack."""


def hush_neighbours() -> None:
    """Let these libraries log errors only: to have installed one changes nothing of what a run prints."""
    for name in NEIGHBOURS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet(*, downloads: bool = False) -> Iterator[None]:
    """Within it transformers logs errors only and draws no bars; before and after, what was set is set.

    Args:
        downloads: draw the bars of files that come from the hub: they can take long.
    """
    from huggingface_hub.utils import enable_progress_bars  # type: ignore[attr-defined]
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if downloads and bars:
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
