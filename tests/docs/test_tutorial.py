"""The tutorial does what it says, from its first block to its last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
def test_every_command_of_the_tutorial_prints_what_the_page_shows(
    root: Path, tmp_path: Path, run_page: Callable[[Path, Path], None]
) -> None:
    run_page(root / "docs" / "tutorial" / "first-plugin.md", tmp_path)
