"""torch and transformers, imported when a rule computes with them; its test is skipped where they are not installed.

Only a missing package skips: one that is installed and broken is an error.
"""

from __future__ import annotations

from typing import Any

import pytest


def torch() -> Any:
    """The module `torch`."""
    return pytest.importorskip("torch", reason="this test computes with torch, which is not installed")


def transformers() -> Any:
    """The module `transformers`."""
    return pytest.importorskip("transformers", reason="this test uses a model of transformers, which is not installed")
