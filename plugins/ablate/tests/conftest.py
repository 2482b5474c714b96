"""The command line in this process; test files share ablated_config.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pegbox.cli import main

sys.path.insert(0, str(Path(__file__).parent))

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Typed:
    """`typed(config, "--only", "a")`: `pegbox ablate` with these; the exit code and what was printed."""

    def run(config: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["pegbox", "ablate", str(file), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run
