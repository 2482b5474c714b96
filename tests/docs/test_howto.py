"""The how-to pages do what they say, each in a copy of the tutorial's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        "choose-an-owner",
        "come-from-another-engine",
        "look-at-masks",
        "prepare-data",
        "write-a-patch",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "after-training",
                "choose-an-optimizer",
                "grpo",
                "long-corpora",
                "pack-rows",
                "preferences",
                "quantized-base",
                "reward-models",
                "save-memory",
                "speed-up-training",
                "watch-a-run",
            )
        ),
        pytest.param("resume-a-run", marks=pytest.mark.slow),
        pytest.param("several-processes", marks=[pytest.mark.slow, pytest.mark.distributed]),
    ],
)
def test_every_command_of_the_page_prints_what_it_shows(
    name: str, root: Path, workspace: Path, run_page: Callable[[Path, Path], None]
) -> None:
    run_page(root / "docs" / "howto" / f"{name}.md", workspace)
