"""A config without one plugin, found and refused without running anything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from ablated_config import HERE, tiny
from pegbox_ablate.variants import check, measured, why_needed, without


def test_nothing_of_a_plugin_is_left_in_a_config_without_it() -> None:
    data = {
        "plugins": ["hf", "./near/soft.py", "sft"],
        "soft": {"by": 2},
        "sft": {},
        "use": {"build_loss": "soft", "load_model": "hf"},
        "loss": {"soft": 0.5, "sft": 1.0},
    }
    assert without(data, "soft", "./near/soft.py") == {
        "plugins": ["hf", "sft"],
        "sft": {},
        "use": {"load_model": "hf"},
        "loss": {"sft": 1.0},
    }
    assert data["soft"] == {"by": 2}


def test_the_reason_why_a_plugin_is_needed_is_that_of_the_plan(tmp_path: Path) -> None:
    data = tiny("idle")
    reasons = {
        name: why_needed(without(data, name, entry), tmp_path)
        for name, entry in zip(("tiny_run", "idle", "sft", "trainer"), data["plugins"], strict=True)
    }
    assert reasons == {
        "tiny_run": "no active plugin owns load_processor",
        "idle": "",
        "sft": "no active plugin owns build_loss",
        "trainer": "no active plugin owns build_runtime",
    }


def test_the_only_owner_of_the_models_format_is_needed(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text((HERE / "tiny_run.py").read_text())
    data = tiny()
    data["model"]["format"] = "gguf"
    assert why_needed(data, tmp_path) == "no active plugin owns load_model[gguf]"


def test_one_of_two_owners_is_not_needed_and_use_no_longer_names_it(tmp_path: Path) -> None:
    data = tiny()
    data["plugins"].append("dft")
    data["use"] = {"build_loss": "dft"}
    assert why_needed(data, tmp_path) == ""
    assert why_needed(without(data, "dft", "dft"), tmp_path) == ""
    assert why_needed(without(data, "sft", "sft"), tmp_path) == ""


def test_a_measured_run_has_the_length_and_schedule_of_the_config(tmp_path: Path) -> None:
    data = tiny()
    data |= {"resume": "auto"}
    data["trainer"] |= {"eval_every": 5, "save_every": 5, "best": "eval_loss", "best_is": "highest"}
    quiet = measured(data, check(data, tmp_path), 4)
    assert quiet["trainer"] == {
        "max_steps": 30,
        "micro_batch": 2,
        "device": "cpu",
        "progress": "none",
        "save_every": None,
        "log_every": 4,
    }
    assert quiet["resume"] is None
    assert data["trainer"]["eval_every"] == 5


def test_torch_is_not_imported_where_nothing_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny()))
    code = (
        "import sys; from pathlib import Path; from pegbox_ablate.ablation import ablate\n"
        "made = ablate('config.yaml', folder=Path('runs'))\n"
        "print(sorted(made.needed), made.base, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "['sft', 'tiny_run', 'trainer'] [] False"
    assert not (tmp_path / "runs").exists()
