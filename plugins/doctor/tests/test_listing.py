"""`pegbox plugins` lists what is installed and imports none of it; `pegbox plugins new` makes a package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import typer
from pegbox.cli import main
from pegbox.discovery import discover
from pegbox_doctor.listing import app

if TYPE_CHECKING:
    from conftest import Site


class Exit(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def pegbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Exit]:
    """The console script, run in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Exit:
        monkeypatch.setattr(sys, "argv", ["pegbox", *arguments])
        code: object = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        printed = capsys.readouterr()
        return Exit(int(str(code)), printed.out, printed.err)

    return run


def install(site: Site, name: str, plugin: str, version: str = "1.0") -> None:
    site.install(name, version, entry_points=f"[pegbox]\n{plugin} = code_of_{plugin}:Plugin\n", code=None)


def test_installed_plugins_are_listed_with_distribution_and_object(
    add_site: Callable[[str], Site], pegbox: Callable[..., Exit]
) -> None:
    site = add_site("site")
    install(site, "dist-zulu", "zulu", "3.1")
    install(site, "dist-alpha", "alpha")
    listed = pegbox("plugins")
    assert (listed.code, listed.err) == (0, "")
    assert listed.out.startswith("Installed plugins (active only in runs that list them)\n")
    lines = [line.split() for line in listed.out.splitlines()]
    assert ["zulu", "dist-zulu", "3.1", "code_of_zulu:Plugin"] in lines
    names = [line[0] for line in lines if line and line[0] in discover()]
    assert {"alpha", "zulu"} <= set(names)
    assert names == sorted(names)
    (entry,) = [entry for entry in json.loads(pegbox("plugins", "--json").out) if entry["name"] == "zulu"]
    assert entry == {
        "name": "zulu",
        "value": "code_of_zulu:Plugin",
        "distribution": "dist-zulu",
        "version": "3.1",
        "requires": [],
    }


def test_both_distributions_of_a_name_are_listed(add_site: Callable[[str], Site], pegbox: Callable[..., Exit]) -> None:
    site = add_site("site")
    for number in (1, 2):
        install(site, f"dist-{number}-of-twin", "twin")
    assert pegbox("plugins").out.count("-of-twin") == 2


def test_listing_plugins_imports_none(add_site: Callable[[str], Site]) -> None:
    site = add_site("site")
    site.install("dist-bad", code="raise OSError('no gpu')")
    code = """
import sys
sys.argv = ["pegbox", "plugins"]
from pegbox.cli import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("MODULES", *{name.split(".")[0] for name in sys.modules})
"""
    variables = {**os.environ, "PYTHONPATH": str(site.folder)}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "dist-bad" in ended.stdout
    modules = set(ended.stdout.splitlines()[-1].split()[1:])
    assert modules & {"fake_module", "torch", "transformers", "numpy"} == set()
    assert {name for name in modules if name.startswith("pegbox_")} == {"pegbox_doctor"}


def test_a_new_plugin_is_made_and_never_overwritten(tmp_path: Path, pegbox: Callable[..., Exit]) -> None:
    made = pegbox("plugins", "new", "tally", "--hook", "on_event")
    assert made.code == 0, made.err
    assert (tmp_path / "pegbox-tally" / "pegbox_tally" / "__init__.py").is_file()
    assert "pip install -e 'pegbox-tally[testing]'" in made.out
    assert "pytest pegbox-tally" in made.out
    again = pegbox("plugins", "new", "tally", "--hook", "on_event")
    assert again.code == 2
    assert "exists already" in again.err
    elsewhere = pegbox("plugins", "new", "tally", "--hook", "on_event", "--folder", "elsewhere")
    assert elsewhere.code == 0, elsewhere.err
    assert (tmp_path / "elsewhere" / "pegbox-tally").is_dir()


def test_a_new_plugin_without_a_hook_is_refused_and_nothing_is_made(
    tmp_path: Path, pegbox: Callable[..., Exit]
) -> None:
    ended = pegbox("plugins", "new", "tally")
    assert ended.code == 2
    assert "--hook" in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_what_the_new_command_proposes_to_type_works(tmp_path: Path, pegbox: Callable[..., Exit]) -> None:
    refused = pegbox("plugins", "new", "My Tally", "--hook", "on_event")
    assert refused.code == 2
    (proposal,) = [line for line in refused.err.splitlines() if line.startswith("Type: pegbox ")]
    assert pegbox(*proposal.removeprefix("Type: pegbox ").split()).code == 0
    assert (tmp_path / "pegbox-my-tally").is_dir()


def parameters(command: Any) -> Iterator[Any]:
    yield from command.params
    for inner in getattr(command, "commands", {}).values():
        yield from parameters(inner)


def test_every_parameter_is_explained() -> None:
    command = typer.main.get_command(app)
    assert [parameter.name for parameter in parameters(command) if not getattr(parameter, "help", None)] == []
    assert {parameter.name for parameter in parameters(command)} == {"json", "name", "hook", "folder"}
