"""Reading configs: the YAML dialect, lines, `extends`, recipes, overrides, and where every value came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox.errors import ConfigError, PluginError
from pegbox.source import Layer, parse, parse_override, read


def origins(layer: Layer) -> dict[str, str]:
    """Origins by dotted key."""
    return {".".join(map(str, path)): str(origin) for path, origin in layer.origins.items() if path}


# ---- the dialect: YAML 1.2's core schema ----


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2e-4", 2e-4),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("+0.5", 0.5),
        ("012", 12),
        ("-7", -7),
        ("+7", 7),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("0b1", "0b1"),
        ("2024-01-02", "2024-01-02"),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("'1'", "1"),
        ('"no"', "no"),
        ("all-linear", "all-linear"),
        ("1.2.3", "1.2.3"),
        ("=", "="),
        ("[1, no, 2e-4]", [1, "no", 2e-4]),
        ("{r: 8}", {"r": 8}),
    ],
)
def test_scalars_are_those_of_yaml_1_2_in_files_and_on_the_command_line(text: str, value: object) -> None:
    for got in (parse(f"key: {text}\n", "c.yaml").data["key"], parse_override(f"key={text}")[1]):
        assert got == value
        assert type(got) is type(value)


def test_keys_are_words_whatever_they_look_like() -> None:
    assert parse("1: a\ntrue: b\nnull: c\n2e-4: d", "c.yaml").data == {"1": "a", "true": "b", "null": "c", "2e-4": "d"}
    assert parse_override("key={1: a, no: b}")[1] == {"1": "a", "no": "b"}


# JSON writes characters beyond the basic plane as two escapes, which YAML does not read as one character; and a key of
# YAML has at most 1024 characters, escapes included.
TEXT = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(data=st.dictionaries(TEXT, JSON, max_size=4))
@settings(max_examples=60, deadline=None)
def test_json_reads_as_itself(data: dict[str, object]) -> None:
    assert parse(json.dumps(data), "c.json").data == data


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}"])
def test_an_empty_file_is_an_empty_config(text: str) -> None:
    assert parse(text, "c.yaml").data == {}


def test_anchors_are_plain_repetition() -> None:
    layer = parse("a: &x {r: 8}\nb: *x\n", "c.yaml")
    assert layer.data == {"a": {"r": 8}, "b": {"r": 8}}
    layer.data["a"]["r"] = 9
    assert layer.data["b"] == {"r": 8}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: [1\nb: 2", ["c.yaml:2", "expected ',' or ']'"]),
        ("a: 1\n\tb: 2", ["c.yaml:2", "\\t"]),
        ("a: 'x\n", ["c.yaml:2", "unexpected end"]),
        ("a: 1\n---\nb: 2", ["c.yaml:2", "another document"]),
        ("a: !!python/name:os.system x", ["c.yaml:1", "python/name"]),
        ("x: 1\na: !mine 3", ["c.yaml:2", "!mine"]),
        ("a: !!binary aGk=", ["c.yaml:1", "binary"]),
        ("a: !!timestamp 2020-01-01", ["c.yaml:1", "timestamp"]),
        ("a: !!int x", ["c.yaml", "'x'"]),
        ("a: &x [*x]", ["c.yaml"]),
        ("a: *nothing", ["c.yaml:1", "nothing"]),
        ("x: 1\n? [a, b]\n: 3", ["c.yaml:2", "sequence"]),
        ("a: " + "[" * 500, ["c.yaml"]),
    ],
    ids=[
        "bracket",
        "tab",
        "quote",
        "documents",
        "python",
        "tag",
        "binary",
        "date",
        "int",
        "loop",
        "alias",
        "key",
        "deep",
    ],
)
def test_text_that_is_no_config_says_where(text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError, match="no valid YAML") as error:
        parse(text, "c.yaml")
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["- a\n- b", "just words", "3"])
def test_a_config_is_a_mapping(text: str) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml must hold a mapping"):
        parse(text, "c.yaml")


def test_a_file_that_is_no_text_is_refused_and_a_byte_order_mark_is_not(here: Path) -> None:
    (here / "c.yaml").write_bytes(b"model: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"c\.yaml is no valid YAML"):
        read("c.yaml")
    (here / "c.yaml").write_bytes(b"\xef\xbb\xbfmodel: gr\xc3\xbcn")
    assert read("c.yaml")[0].data == {"model": "grün"}


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", "'a'", 3),
        ("m:\n  x: 1\n  y: {z: 1}\n  x: 2\n", "'m.x'", 4),
        ("rows:\n- {p: 1}\n- {p: 1, p: 2}\n", "'rows.1.p'", 3),
        ("1: a\n'1': b\n", "'1'", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(text: str, key: str, line: int) -> None:
    with pytest.raises(ConfigError, match=rf"key {key} stands twice \(c\.yaml:{line}\)"):
        parse(text, "c.yaml")


def test_a_key_that_stands_twice_in_an_override_is_refused() -> None:
    with pytest.raises(ConfigError, match="key 'r' stands twice"):
        parse_override("lora={r: 1, r: 2}")


# ---- origins ----


def test_every_key_and_list_entry_knows_its_line() -> None:
    text = "# a comment\nmodel:\n  name: m\nplugins:\n- a\n- b\ndata: {train: [{path: x,\n  format: y}]}\n"
    assert origins(parse(text, "c.yaml")) == {
        "model": "c.yaml:2",
        "model.name": "c.yaml:3",
        "plugins": "c.yaml:4",
        "plugins.0": "c.yaml:5",
        "plugins.1": "c.yaml:6",
        "data": "c.yaml:7",
        "data.train": "c.yaml:7",
        "data.train.0": "c.yaml:7",
        "data.train.0.path": "c.yaml:7",
        "data.train.0.format": "c.yaml:8",
    }


def test_a_key_without_an_origin_has_that_of_the_nearest_key_above() -> None:
    layer = parse("lora:\n  r: 8\n", "c.yaml")
    assert layer.origin(("lora", "alpha", "x")) == "c.yaml:1"
    assert layer.origin(("lora", "r")) == "c.yaml:2"


# ---- overrides ----


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("lora.r=8", ("lora", "r"), 8),
        ("lora.targets=[q, v]", ("lora", "targets"), ["q", "v"]),
        ("data.train.0.path=a=b.jsonl", ("data", "train", 0, "path"), "a=b.jsonl"),
        (" seed = 3", ("seed",), 3),
        ("output=", ("output",), None),
        ("output=''", ("output",), ""),
        ("my-plugin.x_y=1", ("my-plugin", "x_y"), 1),
        ("output=runs/a#b", ("output",), "runs/a#b"),
        ("rewards.m²=1", ("rewards", "m²"), 1),
        ("rewards.²=1", ("rewards", "²"), 1),
    ],
)
def test_an_override_is_a_path_and_a_typed_value(override: str, path: tuple, value: object) -> None:
    assert parse_override(override) == (path, value)


@pytest.mark.parametrize("text", ["seed", "=3", "se ed=3", ".seed=3", "lora..r=3", "lora.=3", "a/b=3", ""])
def test_what_is_no_override_shows_the_form(text: str) -> None:
    with pytest.raises(ConfigError, match="is no override") as error:
        parse_override(text)
    assert repr(text) in str(error.value)
    assert "lora.r=8" in error.value.next


FILE = """\
lora: {r: 8, alpha: 16}
data:
  train:
  - {path: a, format: chat}
  - {path: b, format: chat}
"""


def read_text(here: Path, text: str, *overrides: str) -> Layer:
    (here / "c.yaml").write_text(text)
    return read("c.yaml", overrides)[0]


def test_an_override_replaces_one_value_and_its_origin_and_leaves_the_rest(here: Path) -> None:
    layer = read_text(here, FILE, "lora.r=64", "lora.dropout=0.1", "adamw.learning_rate=1e-3")
    assert layer.data["lora"] == {"r": 64, "alpha": 16, "dropout": 0.1}
    assert layer.data["adamw"] == {"learning_rate": 1e-3}
    found = origins(layer)
    assert [found[key] for key in ("lora", "lora.r", "lora.alpha")] == ["c.yaml:1", "command line", "c.yaml:1"]
    assert found["adamw"] == found["adamw.learning_rate"] == found["lora.dropout"] == "command line"


def test_an_override_reaches_into_a_list_by_position(here: Path) -> None:
    layer = read_text(here, FILE, "data.train.1.path=z")
    assert [entry["path"] for entry in layer.data["data"]["train"]] == ["a", "z"]
    found = origins(layer)
    assert [found[f"data.train.{n}.path"] for n in (0, 1)] == ["c.yaml:4", "command line"]
    assert found["data.train.1.format"] == "c.yaml:5"


def test_a_list_is_replaced_as_a_whole_and_its_old_lines_are_forgotten(here: Path) -> None:
    layer = read_text(here, FILE, "data.train=[{path: z}]")
    assert layer.data["data"]["train"] == [{"path": "z"}]
    assert {k: o for k, o in origins(layer).items() if k.startswith("data.train")} == {
        "data.train": "command line",
        "data.train.0": "command line",
        "data.train.0.path": "command line",
    }


@pytest.mark.parametrize("position", ["2", "7"])
def test_a_position_beyond_a_list_is_refused_with_its_length(here: Path, position: str) -> None:
    with pytest.raises(ConfigError, match=rf"cannot set 'data\.train\.{position}.*'data\.train' holds 2 values"):
        read_text(here, FILE, f"data.train.{position}.path=z")


def test_the_last_of_several_overrides_counts(here: Path) -> None:
    assert read_text(here, FILE, "lora.r=1", "lora={r: 2}", "lora.r=3").data["lora"] == {"r": 3, "alpha": 16}


@given(
    r=st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none(),
    names=st.lists(st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True), min_size=1, max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_an_override_says_the_same_as_the_file(r: object, names: list[str]) -> None:
    value = {"null": None}.get(str(r), r)
    text = "null" if r is None else str(r).lower().replace("inf", ".inf")
    path, got = parse_override(f"{'.'.join(names)}={text}")
    assert path == tuple(names)
    assert got == value == parse(f"k: {text}", "c.yaml").data["k"]


# ---- extends ----


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_a_file_is_laid_over_the_one_it_extends(here: Path) -> None:
    write(
        here,
        top="extends: middle.yaml\nlora: {r: 4}\nplugins: [a]\n",
        middle="extends: bottom.yaml\nlora: {alpha: 2}\n",
        bottom="seed: 1\nlora: {r: 1, alpha: 1, dropout: 0.5}\nplugins: [x, y, z]\n",
    )
    layer, folder = read("top.yaml", ["lora.alpha=3"])
    assert folder == here
    assert layer.data == {"seed": 1, "lora": {"r": 4, "alpha": 3, "dropout": 0.5}, "plugins": ["a"]}
    found = origins(layer)
    assert found["seed"] == "bottom.yaml:1"
    assert found["lora.r"] == "top.yaml:2"
    assert found["lora.alpha"] == "command line"
    assert found["lora.dropout"] == "bottom.yaml:2"
    assert found["plugins.0"] == "top.yaml:3"
    assert "plugins.1" not in found
    assert "extends" not in layer.data


def test_extends_starts_at_the_folder_of_the_file_that_says_it(here: Path) -> None:
    (here / "a/b").mkdir(parents=True)
    write(here / "a/b", low="seed: 5")
    write(here / "a", mid="extends: b/low.yaml")
    write(here, top="extends: a/mid.yaml")
    layer, folder = read(here / "top.yaml")
    assert (layer.data, folder) == ({"seed": 5}, here)
    assert origins(layer)["seed"] == "a/b/low.yaml:1"


@pytest.mark.parametrize("cwd", [".", "sub"])
@pytest.mark.parametrize("spelling", ["a.yaml", "./a.yaml", "../project/a.yaml", "sub/../a.yaml"])
def test_a_circle_of_extends_is_refused_however_it_is_spelt(here: Path, monkeypatch, cwd: str, spelling: str) -> None:
    (here / "sub").mkdir()
    write(here, a="extends: b.yaml", b=f"extends: {spelling}")
    monkeypatch.chdir(here / cwd)
    with pytest.raises(ConfigError, match=r"a\.yaml' extends itself: .*a\.yaml -> .*b\.yaml -> .*a\.yaml"):
        read(here / "a.yaml")


def test_two_files_may_extend_the_same_one(here: Path) -> None:
    write(here, base="seed: 1", a="extends: base.yaml", b="extends: a.yaml")
    assert read("b.yaml")[0].data == {"seed": 1}


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("[a.yaml]", ["['a.yaml']", "c.yaml:2"]),
        ("3", ["'extends' must name one file", "c.yaml:2"]),
        ("bse.yaml", ["'bse.yaml' does not exist", "c.yaml:2", "Did you mean 'base.yaml'"]),
        (".", ["is a folder", "c.yaml:2"]),
    ],
)
def test_a_wrong_extends_says_where_and_what_is_near(here: Path, value: str, parts: list[str]) -> None:
    write(here, base="seed: 1", c=f"seed: 2\nextends: {value}\n")
    with pytest.raises(ConfigError) as error:
        read("c.yaml")
    for part in parts:
        assert part in str(error.value)


def test_a_missing_config_names_the_nearest_one(here: Path) -> None:
    write(here, train="seed: 1")
    with pytest.raises(ConfigError, match=r"'trian\.yaml' does not exist \(command line\)") as error:
        read("trian.yaml")
    assert "Did you mean 'train.yaml'?" in str(error.value)


# ---- recipes and Python ----


def install_recipe(site) -> None:
    files = {"cookbook/__init__.py": "raise OSError('imported')", "cookbook/sft.yaml": "seed: 4\nlora: {r: 2}\n"}
    site.install("dist-cookbook", recipes={"sft-small": "cookbook:sft.yaml"}, files=files)


def test_a_recipe_is_read_without_importing_its_package(site, here: Path) -> None:
    install_recipe(site)
    layer, _ = read("recipe://sft-small", ["seed=5"])
    assert layer.data == {"seed": 5, "lora": {"r": 2}}
    assert origins(layer) == {"seed": "command line", "lora": "recipe://sft-small:2", "lora.r": "recipe://sft-small:2"}


def test_a_file_may_extend_a_recipe(site, here: Path) -> None:
    install_recipe(site)
    write(here, c="extends: recipe://sft-small\nlora: {alpha: 1}\n")
    layer, folder = read("c.yaml")
    assert folder == here
    assert layer.data == {"seed": 4, "lora": {"r": 2, "alpha": 1}}
    assert origins(layer)["seed"] == "recipe://sft-small:1"


def test_a_recipe_of_two_distributions_is_an_error_that_names_both_when_it_is_used(site, here: Path) -> None:
    install_recipe(site)
    recipes = {"sft-small": "other:sft.yaml", "mine": "cookbook:sft.yaml"}
    site.install("dist-other", "2.0", recipes=recipes)
    with pytest.raises(PluginError, match=r"recipe named 'sft-small': dist-cookbook 1\.0 and dist-other 2\.0") as error:
        read("recipe://sft-small")
    assert "pip uninstall dist-other" in error.value.next
    assert read("recipe://mine")[0].data["seed"] == 4


def test_an_unknown_recipe_names_the_nearest_one(site, here: Path) -> None:
    install_recipe(site)
    with pytest.raises(ConfigError, match="no recipe 'sft-smal'") as error:
        read("recipe://sft-smal")
    assert "Did you mean 'sft-small'?" in str(error.value)


def test_a_mapping_is_read_as_it_stands_and_left_untouched(here: Path) -> None:
    given_config = {"extends": "base.yaml", "lora": {"r": 1, "targets": ["q"]}}
    write(here, base="seed: 3\nlora: {alpha: 2}")
    layer, folder = read(given_config, ["lora.targets.0=v"])
    assert folder == here
    assert layer.data == {"seed": 3, "lora": {"alpha": 2, "r": 1, "targets": ["v"]}}
    assert given_config == {"extends": "base.yaml", "lora": {"r": 1, "targets": ["q"]}}
    assert {key: origins(layer)[key] for key in ("seed", "lora.r", "lora.targets.0")} == {
        "seed": "base.yaml:1",
        "lora.r": "python",
        "lora.targets.0": "command line",
    }
