"""What is inside the wheels: their own package, honest metadata, nothing else."""

from __future__ import annotations

import configparser
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Member

pytestmark = pytest.mark.packaging


def contents(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def read(wheel: Path, name: str) -> str:
    (path,) = (path for path in contents(wheel) if path.endswith(f".dist-info/{name}"))
    return zipfile.ZipFile(wheel).read(path).decode()


def metadata(wheel: Path) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


def test_a_wheel_holds_its_own_package_and_metadata_alone(member: Member, wheels: dict[str, Path]) -> None:
    names = contents(wheels[member.distribution])
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {member.package}
    assert f"{member.package}/py.typed" in names
    modules = [Path(name) for name in names if name.endswith(".py")]
    assert [path for path in modules if "tests" in path.parts or path.name.startswith(("test_", "conftest"))] == []


def test_a_wheel_declares_the_entry_points_of_its_pyproject(member: Member, wheels: dict[str, Path]) -> None:
    wanted = dict(member.project.get("entry-points", {}))
    if "scripts" in member.project:
        wanted["console_scripts"] = member.project["scripts"]
    parser = configparser.ConfigParser()
    if wanted:
        parser.read_string(read(wheels[member.distribution], "entry_points.txt"))
    assert {section: dict(parser[section]) for section in parser.sections()} == wanted


def test_no_wheel_asks_for_an_address(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        requirements = metadata(wheel).get_all("Requires-Dist") or []
        assert [text for text in requirements if "@" in text or "://" in text] == [], name


def test_every_wheel_says_its_licence_its_python_and_what_it_is(wheels: dict[str, Path]) -> None:
    for name, wheel in wheels.items():
        fields = metadata(wheel)
        assert fields["License-Expression"] == "Apache-2.0", name
        assert fields["Requires-Python"] == ">=3.11", name
        assert fields["Summary"], name
        assert fields.get_payload().startswith("# "), name


def test_the_umbrella_holds_no_code(wheels: dict[str, Path]) -> None:
    top = {name.partition("/")[0] for name in contents(wheels["pegbox"])}
    assert all(name.endswith(".dist-info") for name in top)
