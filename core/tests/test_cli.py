"""The command line as it is typed: exit codes, what is imported, what is printed, and the commands of plugins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pegbox import __version__


def typed(*arguments: str, path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with a folder of installed distributions."""
    variables = {**os.environ, "NO_COLOR": "1", **environment}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    command = [sys.executable, "-m", "pegbox", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False)


def modules_after(*arguments: str, path: Path) -> set[str]:
    """The top-level modules that a command has imported when it ends."""
    code = f"""
import sys
sys.argv = ["pegbox", *{arguments!r}]
from pegbox.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("MODULES", *{{name.split(".")[0] for name in sys.modules}})
"""
    variables = {**os.environ, "PYTHONPATH": str(path)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.splitlines()[-1].split()[1:])


# ---- what is imported ----


def test_help_imports_no_plugin_and_nothing_slow(site) -> None:
    site.plugin("alpha", commands={"greet": "code_of_greet:main"})
    modules = modules_after("--help", path=site.folder)
    assert "pegbox" in modules
    assert (
        modules & {"pydantic", "yaml", "torch", "transformers", "rich", "numpy", "plugin_of_alpha", "code_of_greet"}
        == set()
    )
    assert not any(name.startswith("pegbox_") for name in modules)


def test_a_plan_imports_the_listed_plugins_and_no_torch(site, here) -> None:
    site.plugin("alpha")
    site.plugin("bravo")
    (here / "c.yaml").write_text("model: {name: m}\nplugins: [alpha]\n")
    modules = modules_after("plan", "c.yaml", path=site.folder)
    assert "plugin_of_alpha" in modules
    assert modules & {"plugin_of_bravo", "torch", "transformers", "numpy"} == set()


# ---- exit codes, in processes of their own ----


def test_a_run_that_ends_well_exits_with_0_and_shows_its_plan(whole) -> None:
    ended = typed("run", "c.yaml")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "some/model" in ended.stdout
    assert "whole" in ended.stdout
    assert (whole / "out/model").read_text() == "trained"


def test_a_run_that_fails_exits_with_1_and_wrong_input_with_2_and_neither_shows_a_trace(whole) -> None:
    failed = typed("run", "c.yaml", "whole.end=failed")
    assert failed.returncode == 1
    assert "error: the loss is nan at step 3\nIt grew.\nSet adamw.learning_rate lower." in failed.stderr
    assert "(in plugin 'whole' (file whole.py), hook run_training)" in failed.stderr
    wrong = typed("run", "c.yaml", "whole.end=bad data", RANK="2")
    assert wrong.returncode == 2
    assert "[rank 2] error: rows.jsonl:7: no key 'messages'" in wrong.stderr
    for ended in (failed, wrong):
        assert "Traceback" not in ended.stdout + ended.stderr


def test_a_bug_shows_its_trace_with_the_plugin_it_is_in(whole) -> None:
    ended = typed("run", "c.yaml", "whole.end=broken")
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "whole.py" in ended.stderr
    assert "in plugin 'whole' (file whole.py), hook run_training" in ended.stderr


# ---- in this process ----


def test_an_interrupted_run_exits_with_1_and_says_how_to_go_on(whole, pegbox) -> None:
    ended = pegbox("run", "c.yaml", "whole.end=interrupted")
    assert ended.code == 1
    assert "Interrupted after step 3" in ended.err
    assert "resume=auto" in ended.err


def test_version_is_that_of_the_core(pegbox) -> None:
    assert pegbox("version").out == f"pegbox-core {__version__}\n"


def test_without_arguments_there_is_help(pegbox) -> None:
    ended = pegbox()
    for command in ("run", "plan", "version"):
        assert command in ended.out + ended.err


def test_help_of_each_command_names_its_arguments(pegbox) -> None:
    for command in ("run", "plan"):
        ended = pegbox(command, "--help")
        assert ended.code == 0
        assert "CONFIG" in ended.out
        assert "KEY=VALUE" in ended.out


def test_a_plan_is_printed_as_tables(whole, pegbox) -> None:
    ended = pegbox("plan", "c.yaml", "seed=7")
    assert (ended.code, ended.err) == (0, "")
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["whole", "file", "whole.py"] in [line[:3] for line in lines]
    assert ["load_model[transformers]", "whole", "the", "only", "one"] in lines
    assert ["seed", "7", "command", "line"] in lines
    assert ["model.name", "some/model", "c.yaml:1"] in lines
    assert ["whole.end", "finished", "default"] in lines


def test_a_plan_on_a_terminal_keeps_brackets_and_every_row(whole, pegbox, monkeypatch) -> None:
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    ended = pegbox("plan", "c.yaml", "output=runs/[red]x")
    for part in ("load_model[transformers]", "runs/[red]x", "command line", "whole.end"):
        assert part in ended.out


def test_a_plan_as_json_is_the_plan(whole, pegbox) -> None:
    from pegbox.plan import compose

    ended = pegbox("plan", "c.yaml", "--json")
    assert json.loads(ended.out) == json.loads(json.dumps(compose("c.yaml").plan.to_json()))


def test_a_quiet_plan_only_checks(whole, pegbox) -> None:
    assert pegbox("plan", "c.yaml", "--quiet").out == ""
    assert pegbox("plan", "c.yaml", "--quiet", "seed=x").code == 2


def test_options_may_stand_before_and_after_the_overrides(whole, pegbox) -> None:
    for arguments in (("--json", "c.yaml", "seed=3"), ("c.yaml", "--json", "seed=3"), ("c.yaml", "seed=3", "--json")):
        config = json.loads(pegbox("plan", *arguments).out)["config"]
        assert {"key": "seed", "value": 3, "from": "command line"} in config


# ---- commands of plugins ----


GREET = '''
from typing import Annotated
import typer
from pegbox.errors import DataError, RunError

def main(name: str, times: Annotated[int, typer.Option(min=1, help="How often.")] = 1) -> None:
    """Greet somebody."""
    if name == "nobody":
        raise DataError("there is nobody", "Greetings need somebody.", "Type: pegbox greet NAME")
    if name == "everybody":
        raise RunError("too many")
    print(f"hello {name} " * times)
'''


@pytest.fixture
def greet(site):
    site.install("dist-greet", "1.5", commands={"greet": "code_of_greet:main"}, files={"code_of_greet.py": GREET})
    return site


def test_commands_of_plugins_are_listed_without_an_import_and_imported_on_use(greet, pegbox) -> None:
    assert "greet" in pegbox("--help").out
    assert "dist-greet" in pegbox("--help").out
    assert "code_of_greet" not in sys.modules
    assert pegbox("greet", "you", "--times", "2").out == "hello you hello you \n"
    assert "code_of_greet" in sys.modules
    assert "How often." in pegbox("greet", "--help").out


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["nobody"], 2, "error: there is nobody"),
        (["everybody"], 1, "error: too many"),
        (["you", "--times", "many"], 2, "'--times'"),
        (["you", "--times", "0"], 2, "'--times'"),
        ([], 2, "issing argument"),
        (["you", "--tims", "2"], 2, "--tims"),
    ],
)
def test_a_command_of_a_plugin_fails_like_one_of_the_core(greet, pegbox, arguments, code, part) -> None:
    ended = pegbox("greet", *arguments)
    assert ended.code == code
    assert part in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("code", ["raise OSError('no gpu')", "import nothing_of_that_name", "x = 1"])
def test_a_command_that_cannot_be_imported_names_its_distribution(site, pegbox, code: str) -> None:
    site.install("dist-sick", "0.3", commands={"sick": "code_of_sick:main"}, files={"code_of_sick.py": code})
    assert "sick" in pegbox("--help").out
    ended = pegbox("sick")
    assert ended.code == 2
    assert "'sick' (dist-sick 0.3) cannot be loaded" in ended.err


def test_a_command_of_two_distributions_is_an_error_that_names_both_when_it_is_used(greet, pegbox) -> None:
    greet.install("dist-other", "2.0", commands={"greet": "code_of_greet:main"})
    assert "greet" in pegbox("--help").out
    ended = pegbox("greet", "you")
    assert (ended.code, ended.out) == (2, "")
    assert "two distributions bring a command named 'greet': dist-greet 1.5 and dist-other 2.0" in ended.err
    assert "pip uninstall dist-other" in ended.err
    assert "code_of_greet" not in sys.modules


def test_a_plugin_cannot_take_the_place_of_a_command_of_the_core(site, pegbox) -> None:
    site.install("dist-false", commands={"version": "code_of_greet:main"}, files={"code_of_greet.py": GREET})
    assert pegbox("version").out == f"pegbox-core {__version__}\n"
