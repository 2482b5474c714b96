"""What is not imported: the command line answers before anything heavy is touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "torch",
    "transformers",
    "numpy",
    "triton",
    "accelerate",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
}


def imported(*arguments: str, cwd: Path) -> set[str]:
    """Top-level names of what `python *arguments` imports, as the interpreter itself reports it."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    reports, words = [], []
    for line in done.stderr.splitlines():
        (reports if line.startswith("import time:") else words).append(line)
    assert done.returncode == 0, "\n".join(words)
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in reports}


def command_line(*arguments: str) -> tuple[str, str]:
    return (
        "-c",
        f"import sys; sys.argv = {['pegbox', *arguments]!r}; from pegbox.cli import main; sys.exit(main())",
    )


def test_importing_the_core_imports_the_standard_library_alone(tmp_path: Path) -> None:
    plain = imported("-c", "pass", cwd=tmp_path)
    new = imported("-c", "import pegbox", cwd=tmp_path) - plain - {"pegbox"}
    assert new <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "module", ["hooks", "types", "section", "context", "config", "kernel", "plan", "patches", "run", "cli"]
)
def test_no_module_of_the_core_imports_anything_heavy(module: str, tmp_path: Path) -> None:
    assert imported("-c", f"import pegbox.{module}", cwd=tmp_path) & HEAVY == set()


def test_help_imports_no_config_machinery_and_no_plugin(tmp_path: Path) -> None:
    names = imported(*command_line("--help"), cwd=tmp_path)
    assert "typer" in names
    assert names & ({"pydantic", "yaml"} | HEAVY) == set()
    assert {name for name in names if name.startswith("pegbox_")} == set()


def test_a_plan_imports_the_plugins_of_its_config_and_nothing_heavy(root: Path, tmp_path: Path) -> None:
    config = root / "examples/quickstart/config.yaml"
    names = imported(*command_line("plan", str(config), f"output={tmp_path / 'run'}"), cwd=root)
    assert {"pegbox_hf", "pegbox_lora", "pegbox_sft", "pegbox_trainer"} <= names
    assert "pegbox_row_losses" not in names
    assert names & HEAVY == set()
