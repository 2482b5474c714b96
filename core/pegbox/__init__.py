"""Pegbox: a plugin-first engine for fine-tuning language models.

This package is the core: hook specifications, the kernel that composes plugins, the config, and the plan.
It knows nothing of deep learning; every capability is a plugin. Import what you need from its modules:
`pegbox.hooks` (the specifications and `hookimpl`), `pegbox.types` (what hooks pass), `pegbox.section` (config
sections), `pegbox.plan.compose` and `pegbox.run.execute` (a run from Python).
"""

__version__ = "0.1.0"
