"""The templates' texts, read when they are asked for: `texts.qwen_3` is the content of `qwen_3.jinja`."""

from __future__ import annotations

from importlib.resources import files


def __getattr__(name: str) -> str:
    try:
        return files("pegbox_templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AttributeError(name) from None
