"""Pages are written, compared and removed as a whole, and nothing that was written by a person is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pegbox.hooks import SPECS

Run = Callable[..., Any]


@pytest.fixture
def written(pegbox: Run, checkout: Path, tmp_path: Path) -> Path:
    """The reference of the packages in `checkout`, written."""
    done = pegbox("docs", "--write", "reference", "--readme", str(checkout))
    assert done.returncode == 0, done.stderr
    return tmp_path / "reference"


def check(pegbox: Run, checkout: Path) -> Any:
    return pegbox("docs", "--write", "reference", "--readme", str(checkout), "--check")


def test_there_is_a_page_for_each_hook_section_and_subject(written: Path) -> None:
    pages = {str(path.relative_to(written)) for path in written.rglob("*.md")}
    subjects = {"index.md", "errors.md", "types.md", "commands.md", "config/index.md", "config/tally.md"}
    assert pages == {f"hooks/{hook}.md" for hook in SPECS} | subjects


def test_pages_cover_the_packages_of_the_folder_and_no_other_installed_one(written: Path) -> None:
    assert "[tally](../config/tally.md): Counts steps" in (written / "hooks" / "on_event.md").read_text()
    assert "pegbox schema" not in (written / "commands.md").read_text()


def test_what_was_just_written_does_not_differ(pegbox: Run, checkout: Path, written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*.md")}
    assert check(pegbox, checkout).returncode == 0
    again = pegbox("docs", "--write", "reference", "--readme", str(checkout))
    assert again.stdout == ""
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*.md")} == before


def test_a_check_names_the_files_that_differ_and_changes_none(pegbox: Run, checkout: Path, written: Path) -> None:
    changed, missing = written / "hooks" / "load_model.md", written / "errors.md"
    changed.write_text(changed.read_text() + "by hand\n")
    missing.unlink()
    done = check(pegbox, checkout)
    assert done.returncode == 1
    named = {line.removeprefix("differs: ") for line in done.stderr.splitlines() if line.startswith("differs: ")}
    assert named == {"reference/hooks/load_model.md", "reference/errors.md"}
    assert changed.read_text().endswith("by hand\n")
    assert not missing.exists()


def test_a_changed_default_is_a_difference(pegbox: Run, checkout: Path, written: Path, site: Path) -> None:
    code = site / "pegbox_tally.py"
    code.write_text(code.read_text().replace("setting(10,", "setting(20,"))
    done = check(pegbox, checkout)
    assert done.returncode == 1
    assert "differs: reference/config/tally.md" in done.stderr
    assert f"differs: {checkout / 'tally' / 'README.md'}" in done.stderr


def test_a_page_that_is_made_no_more_is_removed_and_a_page_of_a_person_is_not(
    pegbox: Run, checkout: Path, written: Path
) -> None:
    stale, own = written / "hooks" / "no_such_hook.md", written / "notes.md"
    stale.write_text((written / "hooks" / "on_event.md").read_text())
    own.write_text("# Mine\n")
    assert "differs: reference/hooks/no_such_hook.md" in check(pegbox, checkout).stderr
    assert pegbox("docs", "--write", "reference", "--readme", str(checkout)).returncode == 0
    assert not stale.exists()
    assert own.read_text() == "# Mine\n"


def test_the_table_goes_between_the_markers_and_the_rest_of_a_readme_stays(checkout: Path, written: Path) -> None:
    text = (checkout / "tally" / "README.md").read_text()
    assert text.startswith("# pegbox-tally\n\nBefore.\n\n<!-- config -->\n| key |")
    assert text.endswith("|\n<!-- /config -->\n\nAfter.\n")
    assert "| `every` | integer ≥ 1 | `10` | steps | How often it counts. |" in text
    assert "old" not in text


@pytest.mark.parametrize(
    "readme", ["# No markers\n", "<!-- /config --> <!-- config -->\n", "<!-- config -->\n" * 2 + "<!-- /config -->"]
)
def test_a_readme_without_one_pair_of_markers_is_an_error_that_shows_them(
    pegbox: Run, checkout: Path, readme: str
) -> None:
    (checkout / "tally" / "README.md").write_text(readme)
    done = pegbox("docs", "--readme", str(checkout))
    assert done.returncode == 2
    assert "<!-- config -->" in done.stderr
    assert (checkout / "tally" / "README.md").read_text() == readme


def test_a_package_that_is_not_installed_is_an_error_with_the_line_to_type(pegbox: Run, checkout: Path) -> None:
    (checkout / "other").mkdir()
    (checkout / "other" / "pyproject.toml").write_text(
        '[project]\nname = "pegbox-other"\n[project.entry-points.pegbox]\nother = "pegbox_other:OtherPlugin"\n'
    )
    done = pegbox("docs", "--write", "reference", "--readme", str(checkout))
    assert done.returncode == 2
    assert f"pip install -e {checkout / 'other'}" in done.stderr


@pytest.mark.parametrize("arguments", [("--check",), ("load_model", "--write", "reference")])
def test_options_that_contradict_each_other_are_an_error(pegbox: Run, arguments: tuple[str, ...]) -> None:
    done = pegbox("docs", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_pages_alone_leave_the_readmes_as_they_are(pegbox: Run, checkout: Path, written: Path) -> None:
    readme = checkout / "tally" / "README.md"
    readme.write_text("# no markers\n")
    done = pegbox("docs", "--write", "reference", "--packages", str(checkout), "--check")
    assert done.returncode == 0, done.stderr
    assert readme.read_text() == "# no markers\n"
