"""Finds the operations: every package beside this one that has a `spec.py` with a `SPEC`."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil

import pegbox_kernels
from pegbox_kernels.harness.opspec import OpSpec


def specs() -> dict[str, OpSpec]:
    """Every operation by name."""
    packages = [found.name for found in pkgutil.iter_modules(pegbox_kernels.__path__) if found.ispkg]
    modules = [f"{pegbox_kernels.__name__}.{name}.spec" for name in packages]
    found = [importlib.import_module(name).SPEC for name in modules if importlib.util.find_spec(name)]
    return {spec.name: spec for spec in found}
