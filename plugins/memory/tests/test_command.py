"""`pegbox memory` prints a table by plugin or JSON, and its exit code says whether a run fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pegbox.cli import main
from pegbox.testing import CommandConformance

Config = Callable[..., dict[str, Any]]


class TestMemory(CommandConformance):
    command = "memory"


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`typed(config, "--json")`: the exit code and what was printed."""

    def run(config: dict[str, Any], *arguments: str) -> tuple[int, str, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        monkeypatch.setattr("sys.argv", ["pegbox", "memory", str(file), *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def test_a_table_names_plugins_and_the_largest_micro_batch(config_of: Config, typed: Any) -> None:
    config = config_of("lora", "activations", trainer={"device": "auto"})
    code, out, _ = typed(config, "--tokens", "64", "--device-gib", "1")
    assert code == 0
    for part in ("weights that are not trained", "hf", "adapters", "lora", "reserved", "process", "fits a device"):
        assert part in out
    assert "The largest micro-batch that fits: " in out


def test_json_holds_the_rows_and_the_verdict(config_of: Config, typed: Any) -> None:
    code, out, _ = typed(config_of(), "--tokens", "64", "--json", "--device-gib", "0.001")
    made = json.loads(out)
    assert code == 1
    assert made["fits"] is False
    assert sum(row["bytes"] for row in made["rows"]) == made["allocated"]


def test_overrides_count(config_of: Config, typed: Any) -> None:
    sizes = [
        json.loads(typed(config_of(), f"trainer.micro_batch={rows}", "--tokens", "64", "--json")[1])["allocated"]
        for rows in (1, 4)
    ]
    assert sizes[0] < sizes[1]


def test_a_mistake_says_what_to_type(config_of: Config, typed: Any) -> None:
    code, _, err = typed(config_of())
    assert code == 2
    assert "--tokens 4096" in err
