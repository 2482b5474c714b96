"""Broken installations are found, each with what, why and next; a sound one adds no problem."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Clinic, Site

HOOK = "from pegbox.hooks import hookimpl\nclass FakePlugin:\n    @hookimpl\n    def {}"


def test_a_sound_plugin_is_no_problem(clinic: Clinic, site: Site) -> None:
    site.install(requires=["pegbox-core>=0.1", "packaging>=1", 'no-such-library; python_version < "3"'])
    assert clinic.problems() == []


def test_one_name_from_two_distributions_is_found(clinic: Clinic, site: Site) -> None:
    site.install()
    site.install("outsider")
    clinic.one_problem("named 'fake'", "pegbox-fake 1.0", "outsider 1.0", "pip uninstall")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import no_such_module", "No module named 'no_such_module'"),
        ("class Other: ...", "defines no class FakePlugin"),
        ("raise SystemExit('stop')", "stop"),
        (HOOK.format("load_modl(self): ..."), "no such hook"),
        (HOOK.format("register_config(self): return 1 / 0"), "division by zero"),
    ],
)
def test_a_plugin_that_cannot_be_activated_is_found(clinic: Clinic, site: Site, code: str, words: str) -> None:
    site.install(code=code)
    clinic.one_problem("plugin 'fake'", "pegbox-fake 1.0", words)


def test_a_plugin_whose_module_is_gone_is_found(clinic: Clinic, site: Site) -> None:
    site.install(code=None)
    clinic.one_problem("plugin 'fake'", "No module named 'fake_module'")


def test_a_plugin_for_another_core_is_found_once(clinic: Clinic, site: Site) -> None:
    site.install(requires=["pegbox-core>=9,<10"])
    clinic.one_problem("needs pegbox-core >=9,<10", version("pegbox-core"))


def test_a_command_for_another_core_is_found(clinic: Clinic, site: Site) -> None:
    site.install(entry_points="[pegbox.commands]\nfake = fake_module:FakePlugin\n", requires=["pegbox-core>=9"])
    clinic.one_problem("pegbox-core", "outside the range of pegbox-fake (>=9)")


def test_a_library_outside_the_declared_range_is_found(clinic: Clinic, site: Site) -> None:
    site.install(requires=["packaging<1"])
    clinic.one_problem(f"packaging {version('packaging')}", "pegbox-fake (<1)", "pip install 'packaging")


def test_a_missing_library_is_found_and_one_of_an_extra_is_not_missed(clinic: Clinic, site: Site) -> None:
    site.install(requires=["no-such-library>=2", 'no-other-library; extra == "more"'])
    clinic.one_problem("no-such-library is missing", "pegbox-fake (>=2)", "pip install 'no-such-library>=2'")


def test_two_copies_of_a_distribution_are_found(clinic: Clinic, add_site: Callable[[str], Site]) -> None:
    add_site("old").install(version="1.0")
    add_site("new").install(version="2.0")
    clinic.one_problem("pegbox-fake is installed 2 times", "1.0 in", "2.0 in")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A source folder that says what `Site.install` writes by default."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "pegbox-fake"\nversion = "1.0"\ndependencies = ["packaging>=1"]\n'
        '[project.entry-points.pegbox]\nfake = "fake_module:FakePlugin"\n'
    )
    return folder


def test_an_editable_distribution_as_its_source_says_is_no_problem(clinic: Clinic, site: Site, source: Path) -> None:
    site.install(source=source, requires=["packaging >= 1"])
    assert clinic.problems() == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('version = "1.0"', 'version = "1.1"', "version 1.0 is 1.1 now"),
        ("packaging>=1", "packaging>=2", "dependencies changed"),
        ("fake = ", "renamed = ", "entry points of pegbox changed (fake, renamed)"),
    ],
)
def test_an_editable_distribution_that_drifted_is_found(
    clinic: Clinic, site: Site, source: Path, old: str, new: str, words: str
) -> None:
    site.install(source=source, requires=["packaging>=1"])
    file = source / "pyproject.toml"
    file.write_text(file.read_text().replace(old, new))
    clinic.one_problem(words, f"pip install -e {source}")


def test_an_editable_distribution_whose_folder_is_gone_is_found(clinic: Clinic, site: Site, source: Path) -> None:
    site.install(source=source.with_name("moved"))
    clinic.one_problem("which does not exist any more", "pip uninstall pegbox-fake")


def test_a_package_that_another_folder_shadows_is_found(
    clinic: Clinic, site: Site, add_site: Callable[[str], Site]
) -> None:
    site.install()
    shadow = add_site("shadow")
    (shadow.folder / "fake_module.py").write_text((site.folder / "fake_module.py").read_text())
    clinic.one_problem("fake_module of pegbox-fake is imported from", "shadow")


def test_what_an_interrupted_pip_left_is_found(clinic: Clinic, site: Site) -> None:
    (site.folder / "~egbox_lora-0.1.0.dist-info").mkdir()
    clinic.one_problem("~egbox_lora-0.1.0.dist-info", "rm -r")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("fake", "import no_such_module", "No module named 'no_such_module'"),
        ("fake", "FakePlugin = 3", "has no function FakePlugin"),
        ("run", "class FakePlugin: ...", "hidden by the core's own"),
    ],
)
def test_a_command_that_cannot_be_used_is_found(clinic: Clinic, site: Site, name: str, code: str, words: str) -> None:
    site.install(entry_points=f"[pegbox.commands]\n{name} = fake_module:FakePlugin\n", code=code)
    clinic.one_problem(f"the command '{name}' of pegbox-fake 1.0", words)


def test_a_command_of_two_distributions_is_found(clinic: Clinic, site: Site) -> None:
    entry_points = "[pegbox.commands]\nfake = fake_module:FakePlugin\n"
    site.install(entry_points=entry_points)
    site.install("outsider", entry_points=entry_points)
    clinic.one_problem("a command named 'fake'", "outsider 1.0")


def test_a_recipe_without_its_file_is_found_and_one_with_it_is_none(clinic: Clinic, site: Site) -> None:
    package = site.folder / "fake_recipes"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "good.yaml").write_text("plugins: []\n")
    site.install(entry_points="[pegbox.recipes]\ngood = fake_recipes:good.yaml\nbad = fake_recipes:bad.yaml\n")
    clinic.one_problem("the recipe 'bad' of pegbox-fake 1.0", "fake_recipes:bad.yaml")


def test_an_egg_that_pegbox_does_not_see_is_found(clinic: Clinic, site: Site) -> None:
    egg = site.folder / "pegbox_fake.egg-info"
    site.install().rename(egg)
    (egg / "METADATA").rename(egg / "PKG-INFO")
    clinic.one_problem(
        "'fake' of pegbox-fake", "without a dist-info folder", "pip install --force-reinstall pegbox-fake"
    )


def test_looking_at_plugins_imports_nothing_heavy(check_alone: Callable[..., dict[str, Any]]) -> None:
    report = check_alone(
        "plugins.check_plugins(report); import sys; report.fact('Test', 'torch', 'torch' in sys.modules)"
    )
    assert report["facts"]["Test"]["torch"] == "False"


def test_a_check_that_fails_itself_is_a_problem_and_the_others_go_on(clinic: Clinic, site: Site, source: Path) -> None:
    (source / "pyproject.toml").write_text("no toml [")
    site.install(source=source, code="import no_such_module")
    found = [problem.what for problem in clinic.problems()]
    assert len(found) == 2
    assert found[0].startswith("the check of distributions failed: TOMLDecodeError")
    assert "plugin 'fake'" in found[1]
