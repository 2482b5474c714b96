"""What the README shows is so: its config, its plugin, its error, its table, its commands."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from pegbox.events import Logged, Signal
from pegbox.kernel import Kernel
from pegbox.plan import compose, require_training

if TYPE_CHECKING:
    from conftest import Member

MOST_LINES = 115
"""Besides the table of packages, which has a line for each."""
ROW = re.compile(r"^\| \[(?P<name>[\w-]+)\]\((?P<path>[\w/-]+)\) \| .+ \| (?P<fills>[^|]+) \|$", re.MULTILINE)


@pytest.fixture(scope="module")
def readme(root: Path) -> Path:
    return root / "README.md"


@pytest.fixture
def shown(readme: Path, run_page: Callable[[Path, Path], None], tmp_path: Path) -> Path:
    """A folder with the files of the README, after its sessions were run there."""
    run_page(readme, tmp_path)
    return tmp_path


def test_it_is_short(readme: Path) -> None:
    lines = readme.read_text().splitlines()
    assert len([line for line in lines if not ROW.match(line)]) <= MOST_LINES


def test_its_config_is_a_complete_run(shown: Path) -> None:
    ctx = compose(shown / "train.yaml", ["lora.r=8"])
    require_training(ctx)
    assert list(ctx.kernel.active) == ["hf", "data", "lora", "sft", "adamw", "trainer"]


def test_its_plugin_stops_a_run_whose_loss_is_low_enough(shown: Path) -> None:
    (shown / "stop.yaml").write_text("model: {name: any}\nplugins: [./stop_at.py]\nstop_at: {loss: 0.7}\n")
    ctx = compose(shown / "stop.yaml")
    high, low = (Logged(step=1, metrics={"loss": loss}) for loss in (0.71, 0.69))
    assert ctx.notify(high) == Signal.NONE
    assert ctx.notify(low) == Signal.STOP
    assert ctx.notify(SimpleNamespace(step=1)) == Signal.NONE


def test_its_table_names_every_package_and_exactly_what_it_fills(
    readme: Path, root: Path, members: list[Member]
) -> None:
    table = {match["path"]: set(re.findall(r"`([^`]+)`", match["fills"])) for match in ROW.finditer(readme.read_text())}
    filled = {}
    for member in members:
        if member.kind in {"plugins", "contrib"}:
            commands = member.project.get("entry-points", {}).get("pegbox.commands", {})
            hooks = {i.hook for name in member.plugins for i in Kernel.activate([name], Path()).implementations()}
            shown = {f"pegbox {name}" for name in commands} | {
                hook for hook in hooks if not hook.startswith("register_")
            }
            filled[str(member.folder.relative_to(root))] = shown
    assert table == filled
