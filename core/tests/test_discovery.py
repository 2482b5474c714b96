"""Installed is not active: what is found without an import, what is imported, and what is refused by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from hashlib import blake2b
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from pegbox import __version__, hooks
from pegbox.context import Context
from pegbox.discovery import Installed, admits, check_api, discover
from pegbox.errors import DataError, PluginError
from pegbox.plan import compose

RUNTIME = "@hookimpl\ndef build_runtime(self, ctx):\n    return '{answer}'"


def listing(*plugins: str) -> dict[str, object]:
    return {"model": {"name": "some/model"}, "plugins": list(plugins)}


# ---- discovery ----


def test_an_installed_plugin_is_found_with_its_distribution_and_without_an_import(site) -> None:
    site.plugin("alpha", version="1.2.3", requires=("pegbox-core>=0.1",))
    found = discover()["alpha"]
    assert found == [Installed("alpha", "plugin_of_alpha:Plugin", "dist-alpha", "1.2.3", ("pegbox-core>=0.1",))]
    assert str(found[0]) == "dist-alpha 1.2.3"
    assert "plugin_of_alpha" not in sys.modules


def test_a_plugin_whose_import_fails_is_listed_and_harmless_until_it_is_active(site) -> None:
    site.install(
        "dist-bad", plugins={"bad": "bad_code:Plugin"}, files={"bad_code.py": "x = 1\nraise OSError('no gpu')"}
    )
    site.plugin("good")
    assert "bad" in discover()
    assert list(compose(listing("good")).kernel.active) == ["good"]
    assert "bad_code" not in sys.modules
    with pytest.raises(PluginError) as error:
        compose(listing("good", "bad"))
    for part in ("'bad'", "dist-bad 1.0", "OSError: no gpu", "bad_code.py:2", "remove it from plugins"):
        assert part in str(error.value)
    assert isinstance(error.value.__cause__, OSError)


def test_only_listed_plugins_are_imported(site) -> None:
    site.plugin("alpha")
    site.plugin("bravo")
    compose(listing("bravo"))
    assert "plugin_of_bravo" in sys.modules
    assert "plugin_of_alpha" not in sys.modules


def test_each_run_has_its_own_instance_of_a_plugin(site) -> None:
    site.plugin("alpha")
    one, two = (compose(listing("alpha")).kernel.active["alpha"].instance for _ in range(2))
    assert type(one) is type(two)
    assert one is not two


def test_two_distributions_with_one_name_are_refused_with_both_named_and_only_if_listed(site) -> None:
    site.plugin("alpha")
    for number in (1, 2):
        site.install(f"twin-{number}", f"{number}.5", plugins={"twin": f"twin_{number}:Plugin"})
    assert [str(plugin) for plugin in discover()["twin"]] == ["twin-1 1.5", "twin-2 2.5"]
    compose(listing("alpha"))
    with pytest.raises(PluginError, match=r"'twin': twin-1 1\.5 and twin-2 2\.5") as error:
        compose(listing("twin"))
    assert "pip uninstall twin-2" in error.value.next


def test_a_plugin_that_is_not_installed_names_the_nearest_one_and_the_pip_line(site) -> None:
    site.plugin("quantize")
    with pytest.raises(PluginError, match="'quantise' is not installed") as error:
        compose(listing("quantise"))
    assert "Did you mean 'quantize'?" in str(error.value)
    assert "pip install pegbox-quantise" in str(error.value)


def test_an_entry_point_without_its_class_names_the_class(site) -> None:
    site.install("dist-hollow", plugins={"hollow": "hollow_code:Missing"}, files={"hollow_code.py": ""})
    with pytest.raises(PluginError, match=r"'hollow' \(dist-hollow 1\.0\) defines no class Missing"):
        compose(listing("hollow"))


def test_a_plugin_whose_constructor_fails_is_named_with_the_line(site) -> None:
    site.plugin("fussy", "def __init__(self):\n    raise KeyError('cuda')")
    with pytest.raises(PluginError, match=r"'fussy' \(dist-fussy 1\.0\).*KeyError: 'cuda' \(plugin_of_fussy\.py:6\)"):
        compose(listing("fussy"))


def test_an_error_that_a_plugin_raises_on_purpose_at_import_keeps_its_words(site) -> None:
    text = "from pegbox.errors import DataError\nraise DataError('no compiler', 'Needed.', 'Type: apt install gcc')"
    site.install("dist-words", plugins={"words": "words_code:Plugin"}, files={"words_code.py": text})
    with pytest.raises(DataError, match="no compiler"):
        compose(listing("words"))


# ---- local plugins ----


def write_local(folder: Path, name: str, answer: str) -> None:
    method = RUNTIME.format(answer=answer).replace("\n", "\n    ")
    (folder / name).write_text(f"from pegbox.hooks import hookimpl\n\n\nclass Plugin:\n    {method}\n")


def test_a_file_beside_the_config_is_a_plugin_wherever_the_command_is_typed(tmp_path, monkeypatch) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    project.mkdir(), elsewhere.mkdir()
    write_local(project, "mine.py", "from the file")
    (project / "c.yaml").write_text("model: {name: m}\nplugins: [./mine.py]\n")
    monkeypatch.chdir(elsewhere)
    ctx = compose(project / "c.yaml")
    assert ctx.call(hooks.build_runtime, ctx) == "from the file"
    content = blake2b((project / "mine.py").read_bytes(), digest_size=4).hexdigest()
    assert ctx.plan.plugins == (("mine", f"file mine.py {content}"),)


def test_an_edited_local_plugin_acts_in_the_next_run(here, compose_text) -> None:
    text = "model: {name: m}\nplugins: [./mine.py]\n"
    for answer in ("the first version", "a longer second version"):
        write_local(here, "mine.py", answer)
        ctx = compose_text(text)
        assert ctx.call(hooks.build_runtime, ctx) == answer


def test_a_missing_local_plugin_names_the_nearest_file(here) -> None:
    write_local(here, "rewards.py", "x")
    with pytest.raises(PluginError, match=r"'\./reward\.py' does not exist") as error:
        compose(listing("./reward.py"))
    assert "Did you mean './rewards.py'?" in str(error.value)


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("x = 1", ["'mine' (file mine.py)", "defines no class Plugin"]),
        ("import os\n\nos.nothing", ["'mine' (file mine.py)", "AttributeError", "(mine.py:3)"]),
        ("class Plugin:\n  x = = 1", ["'mine' (file mine.py)", "SyntaxError", "mine.py, line 2"]),
    ],
    ids=["no-class", "raises", "syntax"],
)
def test_a_broken_local_plugin_says_where(here, code, parts) -> None:
    (here / "mine.py").write_text(code)
    with pytest.raises(PluginError) as error:
        compose(listing("./mine.py"))
    for part in parts:
        assert part in str(error.value)


def test_a_local_and_an_installed_plugin_cannot_share_a_name(here, site) -> None:
    site.plugin("alpha", version="3.0")
    write_local(here, "alpha.py", "x")
    with pytest.raises(PluginError, match=r"'alpha': dist-alpha 3\.0 and file alpha\.py"):
        compose(listing("alpha", "./alpha.py"))


def test_ready_objects_take_the_place_of_installed_plugins(site) -> None:
    site.plugin("alpha", RUNTIME.format(answer="installed"))

    class Ready:
        @hooks.hookimpl
        def build_runtime(self, ctx: Context) -> object:
            return "ready"

    ctx = compose(listing("alpha"), instances={"alpha": Ready()})
    assert ctx.call(hooks.build_runtime, ctx) == "ready"
    assert "plugin_of_alpha" not in sys.modules


# ---- the version of the hooks ----


NUMBER = st.integers(min_value=0, max_value=3)
RELEASE = st.lists(NUMBER, min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))
CLAUSE = st.tuples(st.sampled_from([">=", ">", "<=", "<", "==", "!="]), st.sampled_from(["", " "]), RELEASE)


@given(clauses=st.lists(CLAUSE.map("".join), min_size=1, max_size=3), version=RELEASE)
@settings(max_examples=150, deadline=None)
def test_a_version_is_admitted_exactly_as_packaging_says(clauses: list[str], version: str) -> None:
    text = ",".join(clauses)
    assert admits(text, version) == SpecifierSet(text).contains(version)


@pytest.mark.parametrize(
    ("specifiers", "version"),
    [
        (">=0.1,<0.2", "0.1.0"),
        (">=0.1,<0.2", "0.1.99"),
        (">=0.1,<0.2", "0.2.0"),
        (">=0.1, <0.2", "0.10.0"),
        (">=0.10", "0.9"),
        ("==0.1", "0.1.0"),
        ("!=0.1.1,>=0.1", "0.1.1"),
        (">0.1", "0.1.0"),
    ],
)
def test_the_usual_requirements_agree_with_packaging(specifiers: str, version: str) -> None:
    assert admits(specifiers, version) == SpecifierSet(specifiers).contains(version)


@pytest.mark.parametrize(
    "requirement", ["pegbox-core<0.1", "pegbox_core (>=9)", "Pegbox.Core>=0.1,<0.1", "pegbox-core[testing]>9"]
)
def test_a_plugin_for_another_core_is_refused_before_its_import(site, requirement: str) -> None:
    site.plugin("old", "raise RuntimeError", version="4.0", requires=(requirement,))
    with pytest.raises(
        PluginError, match=rf"'old' \(dist-old 4\.0\) needs pegbox-core .*this is {__version__}"
    ) as error:
        compose(listing("old"))
    assert "pip install --upgrade dist-old" in error.value.next
    assert "plugin_of_old" not in sys.modules


@pytest.mark.parametrize(
    "requirement",
    [
        "pegbox-core",
        "pegbox-core>=0.1,<0.2",
        "pegbox-core (>=0.1)",
        "pegbox-core[testing]>=0.1; python_version >= '3.8'",
        "pegbox-core @ file:///somewhere/core",
        "pegbox-core-extras>=9",
        "pegbox-core.extras>=9",
        "torch>=9",
    ],
)
def test_a_plugin_for_this_core_or_without_a_requirement_is_admitted(requirement: str) -> None:
    check_api(Installed("alpha", "a:b", "dist-alpha", "1.0", (requirement,)), "0.1.0")


def test_what_the_plan_says_of_a_plugin_is_its_distribution_and_version(site) -> None:
    site.plugin("alpha", version="2.7")
    assert compose(listing("alpha")).plan.plugins == (("alpha", "dist-alpha 2.7"),)


def test_a_missing_owner_names_the_installed_plugins_that_could_do_it(site, composed: Callable[..., Context]) -> None:
    site.plugin("runner", RUNTIME.format(answer="x"))
    site.plugin("idler")
    site.install("dist-bad", plugins={"bad": "bad_code:Plugin"}, files={"bad_code.py": "raise OSError"})
    ctx = composed({})
    with pytest.raises(PluginError, match="no active plugin owns build_runtime") as error:
        ctx.call(hooks.build_runtime, ctx)
    assert "runner" in str(error.value)
    assert "idler" not in str(error.value)
    assert "bad" not in str(error.value)


# ---- reading dist-info folders: importlib.metadata is the independent truth ----


def as_importlib_sees(group: str) -> list[tuple[str, str, str, str]]:
    return sorted((e.name, e.value, e.dist.name, e.dist.version) for e in entry_points(group=group))


def as_we_see(group: str) -> list[tuple[str, str, str, str]]:
    every = (plugin for found in discover(group).values() for plugin in found)
    return sorted((p.name, p.value, p.distribution, p.version) for p in every)


@pytest.mark.parametrize("group", ["pegbox", "pegbox.commands", "pegbox.recipes", "console_scripts", "pytest11"])
def test_what_is_installed_here_is_found_as_importlib_metadata_finds_it(group: str) -> None:
    assert as_we_see(group) == as_importlib_sees(group)


@pytest.mark.parametrize(
    "text",
    [
        "[pegbox]\nquirk = a.b:C\n",
        "[pegbox]\nquirk=a.b:C",
        "\n\n[other]\nx = y:Z\n\n[pegbox]\n\nquirk = a.b:C\n\n[more]\nx = y:Z\n",
        "[pegbox]\n[pegbox.commands]\nquirk = a.b:main\n",
        "[pegbox.commands]\nquirk = a.b:main\n[pegbox]\n",
        "[pegbox]\n# old = a.b:Old\nquirk = a.b:C\n",
        "[console_scripts]\npegbox = a.b:main\n",
        "[not.pegbox]\nquirk = a.b:C\n",
        "",
    ],
)
@pytest.mark.parametrize("group", ["pegbox", "pegbox.commands"])
def test_entry_points_are_read_as_importlib_metadata_reads_them(site, text: str, group: str) -> None:
    site.install("dist-quirk", "1.2")
    (site.folder / "dist_quirk-1.2.dist-info/entry_points.txt").write_text(text)
    assert as_we_see(group) == as_importlib_sees(group)


def test_a_distribution_that_lies_twice_on_the_path_counts_once_as_for_python(site, tmp_path, monkeypatch) -> None:
    site.plugin("alpha", version="1.0")
    nearer = type(site)(tmp_path / "nearer")
    nearer.plugin("alpha", version="2.0")
    monkeypatch.syspath_prepend(str(nearer.folder))
    assert [str(plugin) for plugin in discover()["alpha"]] == ["dist-alpha 2.0"]
    assert as_we_see("pegbox") == as_importlib_sees("pegbox")


def test_the_description_of_a_distribution_is_no_requirement(site) -> None:
    site.plugin("alpha", requires=("pegbox-core>=0.1",))
    metadata = site.folder / "dist_alpha-1.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text() + "\nIn your own project:\n\nRequires-Dist: pegbox-core>=9\n")
    assert discover()["alpha"][0].requires == ("pegbox-core>=0.1",)


@pytest.mark.parametrize("damage", ["no metadata", "bytes", "no entry points"])
def test_a_damaged_distribution_does_not_keep_others_from_being_found(site, damage: str) -> None:
    site.plugin("alpha")
    site.plugin("hurt")
    folder = site.folder / "dist_hurt-1.0.dist-info"
    if damage == "no metadata":
        (folder / "METADATA").unlink()
    elif damage == "bytes":
        (folder / "METADATA").write_bytes(b"Name: dist-hurt\nVersion: 1.0\nAuthor: \xff\xfe\n")
    else:
        (folder / "entry_points.txt").unlink()
    assert discover()["alpha"][0].distribution == "dist-alpha"
    assert ("hurt" in discover()) is (damage != "no entry points")
