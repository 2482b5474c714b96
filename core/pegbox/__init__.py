"""Pegbox: a plugin-first engine for fine-tuning language models.

This package is the core: hook specifications, the kernel that composes plugins, the config, and the plan.
It knows nothing of deep learning; every capability is a plugin. Import what you need from its modules:
`pegbox.hooks` (the specifications), `pegbox.types` (what hooks pass), `pegbox.config` (sections).

Nothing heavy is imported here, so that `import pegbox` and `pegbox --help` stay instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "hookimpl"]

if TYPE_CHECKING:
    from pegbox.hooks import hookimpl


def __getattr__(name: str) -> object:
    if name == "hookimpl":
        from pegbox.hooks import hookimpl

        return hookimpl
    raise AttributeError(f"module 'pegbox' has no attribute {name!r}")
