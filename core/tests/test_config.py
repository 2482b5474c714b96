"""The resolved config: strict types, mistakes that teach, defaults, origins, and reading back what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pegbox.config import RunSection
from pegbox.context import Context
from pegbox.errors import ConfigError, PluginError, UserError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.section import Section, setting
from pegbox.types import ConfigSection
from pydantic import Field, ValidationError, model_validator

Compose = Callable[..., Context]


class Source(Section):
    """One source of rows."""

    path: str = setting(..., "File of rows.", min_length=1)
    format: str | None = setting(None, "How a row is read.")


class Mix(Section):
    """How sources are mixed."""

    weights: dict[str, float] = setting({}, "Weight of each source.")
    temperature: float = setting(1.0, "Flattens the weights.", gt=0)


class Everything(Section):
    """A section with every kind of field."""

    r: int = setting(16, "Rank.", unit="1", ge=1)
    alpha: float = setting(32.0, "Scale.", unit="1")
    use_rslora: bool = setting(False, "Scale by the root of the rank.")
    bias: Literal["none", "all"] = setting("none", "Which biases are trained.")
    targets: tuple[str, ...] | Literal["all-linear"] = setting("all-linear", "Which modules get an adapter.")
    sources: tuple[Source, ...] = setting((), "Where rows come from.")
    mix: Mix = setting(Mix(), "How they are mixed.")
    limit: Annotated[int, Field(ge=0)] | None = setting(None, "At most so many rows.", unit="rows")

    @model_validator(mode="after")
    def _rank_and_scale(self) -> Everything:
        if self.use_rslora and self.alpha < 1:
            raise ValueError("alpha is below 1 although use_rslora is on. Set alpha to 1 or more")
        return self


class Lora:
    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=Everything)


class Bare:
    """A plugin without settings."""


HEAD = "model: {name: m}\nplugins: [lora]\n"


@pytest.fixture
def lora(compose_text: Compose) -> Callable[..., Everything]:
    """Compose YAML with the plugin `lora` and return its section."""

    def read_section(text: str, *overrides: str) -> Everything:
        return compose_text(HEAD + text, *overrides, lora=Lora()).section(Everything)

    return read_section


def mistake(read: Callable[..., object], text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(text, *overrides)
    assert error.value.exit_code == 2
    return str(error.value)


# ---- values ----


def test_a_section_that_is_absent_or_empty_is_its_defaults(lora) -> None:
    assert lora("") == lora("lora:\n") == lora("lora: {}\n") == Everything()


def test_values_are_read_with_their_types(lora) -> None:
    text = "lora: {r: 8, alpha: 2, use_rslora: true, targets: [q, v], sources: [{path: a}], mix: {weights: {a: 1}}}"
    section = lora(text, "lora.bias=all", "lora.sources.0.format=no", "lora.limit=3")
    assert section.targets == ("q", "v")
    assert section.sources == (Source(path="a", format="no"),)
    assert (section.r, section.bias, section.limit, section.mix.weights) == (8, "all", 3, {"a": 1.0})
    assert type(section.alpha) is float


def test_a_resolved_section_cannot_be_changed(lora) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        lora("").r = 3


def test_paths_of_a_config_start_at_its_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/c.yaml").write_text("model: {name: m}\noutput: runs/x\n")
    monkeypatch.chdir(tmp_path)
    ctx = compose("configs/c.yaml")
    assert ctx.config.path("rows.jsonl") == tmp_path / "configs/rows.jsonl"
    assert ctx.config.path("../rows.jsonl") == tmp_path / "rows.jsonl"
    assert ctx.config.path("/data/rows.jsonl") == Path("/data/rows.jsonl")
    assert ctx.config.path("~/rows.jsonl") == Path.home() / "rows.jsonl"
    assert ctx.folder == tmp_path / "runs/x"


def test_the_record_of_a_config_means_the_same_paths_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    for folder in ("configs", "runs/first", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/c.yaml").write_text("model: {name: m}\n")
    first = compose(tmp_path / "configs/c.yaml").config
    record = first.record(tmp_path / "runs/first")
    assert record == {**first.resolved(), "paths_from": "../../configs"}
    (tmp_path / "runs/first/config.yaml").write_text(yaml.safe_dump(record))
    (tmp_path / "elsewhere/more.yaml").write_text("extends: ../runs/first/config.yaml\nseed: 1\n")
    (tmp_path / "link").symlink_to(tmp_path / "runs/first")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for written in ("../runs/first/config.yaml", tmp_path / "link/config.yaml", "more.yaml"):
        again = compose(written).config
        assert again.path("rows.jsonl") == tmp_path / "configs/rows.jsonl"
        assert again.record(tmp_path / "runs/first")["paths_from"] == "../../configs"
    assert compose("more.yaml").config.run.seed == 1


def test_where_paths_start_may_be_said_on_the_command_line_and_from_python(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: m}\npaths_from: data\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert compose("../c.yaml").config.path("a") == tmp_path / "data/a"
    assert compose("../c.yaml", ["paths_from=rows"]).config.path("a") == tmp_path / "here/rows/a"
    assert compose({"model": {"name": "m"}, "paths_from": "rows"}).config.path("a") == tmp_path / "here/rows/a"
    assert compose("../c.yaml", ["paths_from=null"]).config.path("a") == tmp_path / "a"
    with pytest.raises(ConfigError, match="'paths_from' is 3"):
        compose("../c.yaml", ["paths_from=3"])


def test_paths_given_from_python_are_read_as_words(tmp_path: Path) -> None:
    assert compose({"model": {"name": tmp_path / "m"}, "output": tmp_path / "out"}).folder == tmp_path / "out"


def test_a_section_that_no_plugin_declares_is_an_error(composed) -> None:
    with pytest.raises(PluginError, match="no active plugin declares the section Everything"):
        composed({"bare": Bare()}).section(Everything)


# ---- strictness ----


@pytest.mark.parametrize(
    ("text", "seen", "problem"),
    [
        ("r: '8'", "'lora.r' is \"8\"", "valid integer"),
        ("r: 8.0", "'lora.r' is 8.0", "valid integer"),
        ("r: 1e1", "'lora.r' is 10.0", "valid integer"),
        ("r: true", "'lora.r' is true", "valid integer"),
        ("r: null", "'lora.r' is null", "valid integer"),
        ("r: 0", "'lora.r' is 0", "greater than or equal to 1"),
        ("alpha: two", "'lora.alpha' is \"two\"", "valid number"),
        ("alpha: '2e-4'", "'lora.alpha' is \"2e-4\"", "valid number"),
        ("use_rslora: yes", "'lora.use_rslora' is \"yes\"", "valid boolean"),
        ("use_rslora: 1", "'lora.use_rslora' is 1", "valid boolean"),
        ("bias: some", "'lora.bias' is \"some\"", "'none' or 'all'"),
        ("sources: [{path: 3}]", "'lora.sources.0.path' is 3", "valid string"),
        ("sources: {path: a}", '\'lora.sources\' is {"path": "a"}', "valid array"),
        ("mix: {temperature: 0}", "'lora.mix.temperature' is 0", "greater than 0"),
        ("mix: {weights: {a: x}}", "'lora.mix.weights.a' is \"x\"", "valid number"),
        ("mix: 3", "'lora.mix' is 3", "object"),
        ("limit: -1", "'lora.limit' is -1", "greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_shown_with_its_line_and_what_is_wanted(lora, text: str, seen: str, problem: str) -> None:
    said = mistake(lora, f"lora:\n  {text}\n")
    assert seen in said
    assert "(c.yaml:4)" in said
    assert problem in said


@pytest.mark.parametrize("override", ["lora.r='8'", "lora.r=8.0", "lora.r=eight", "lora.r=[8]", "lora.r="])
def test_an_override_is_as_strict_as_the_file(lora, override: str) -> None:
    said = mistake(lora, "lora: {r: 3}\n", override)
    assert "'lora.r' is" in said
    assert "(command line)" in said


def test_a_wrong_value_comes_with_the_documentation_of_its_key(lora) -> None:
    assert "At most so many rows." in mistake(lora, "lora: {limit: x}")
    assert "Flattens the weights." in mistake(lora, "lora: {mix: {temperature: x}}")
    assert "File of rows." in mistake(lora, "lora: {sources: [{path: 1}]}")


def test_a_value_that_fits_no_member_of_a_union_is_named_once_with_its_key(lora) -> None:
    said = mistake(lora, "lora: {targets: 3}")
    assert "'lora.targets' is 3 (c.yaml:3)" in said


def test_a_position_in_a_list_is_named_with_its_own_line(lora) -> None:
    said = mistake(lora, "lora:\n  sources:\n  - path: a\n  - path: b\n    format: 7\n")
    assert "'lora.sources.1.format' is 7 (c.yaml:7)" in said


# ---- unknown and missing keys ----


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("lora: {rnak: 3}", ["unknown key 'rnak' in section 'lora' (c.yaml:3)", "Known: alpha"]),
        ("lora: {rslora: true}", ["unknown key 'rslora'", "Did you mean 'use_rslora'?"]),
        ("lora: {R: 3}", ["unknown key 'R'", "Did you mean 'r'"]),
        ("lora: {mix: {wieghts: {}}}", ["unknown key 'wieghts' in section 'lora.mix'", "Did you mean 'weights'?"]),
        ("lora: {sources: [{pth: a, path: b}]}", ["unknown key 'pth' in section 'lora.sources.0'", "'path'"]),
        ("lora: {zzz: 1}", ["unknown key 'zzz'", "Known:", "use_rslora"]),
        ("lora: 3", ["'lora' is 3 (c.yaml:3)", "an object"]),
        ("lora: [r]", ["'lora' is [\"r\"] (c.yaml:3)", "an object"]),
        ("lora: {sources: [{}]}", ["'lora.sources.0.path' is missing (c.yaml:3)", "Set lora.sources.0.path"]),
    ],
)
def test_a_mistaken_key_says_where_and_what_was_meant(lora, text: str, parts: list[str]) -> None:
    said = mistake(lora, text)
    for part in parts:
        assert part in said


def test_a_mistaken_key_in_an_extended_file_is_found_there(here: Path) -> None:
    (here / "base.yaml").write_text("seed: 1\nlora:\n  alhpa: 3\n")
    (here / "c.yaml").write_text("extends: base.yaml\n" + HEAD)
    with pytest.raises(ConfigError, match=r"unknown key 'alhpa' in section 'lora' \(base\.yaml:3\)"):
        compose("c.yaml", instances={"lora": Lora()})


def test_a_missing_section_names_the_config_it_is_missing_in(lora, here: Path) -> None:
    (here / "c.yaml").write_text("plugins: []\n")
    (here / "top.yaml").write_text("extends: c.yaml\n")
    for name in ("c", "top"):
        with pytest.raises(ConfigError, match=rf"'model' is missing \({name}\.yaml"):
            compose(f"{name}.yaml", ["seed=1"])


def test_several_mistakes_are_told_at_once(lora) -> None:
    said = mistake(lora, "lora:\n  rnak: 1\n  alpha: x\n  bias: some\n", "lora.limit=-3")
    assert said.startswith("4 mistakes in the config:")
    for part in ("'rnak' in section 'lora' (c.yaml:4)", "(c.yaml:5)", "(c.yaml:6)", "(command line)"):
        assert part in said
    assert [line.startswith("  ") for line in said.splitlines() if not line.startswith("- ")][1:] == [True] * 4
    assert said.count("\n- ") == 4


def test_a_rule_over_several_fields_keeps_its_words_and_names_the_section(lora) -> None:
    said = mistake(lora, "lora: {use_rslora: true, alpha: 0.5}")
    assert said == "lora: alpha is below 1 although use_rslora is on. Set alpha to 1 or more (c.yaml:3)"


# ---- keys at the top ----


def test_a_section_of_an_installed_plugin_that_is_not_listed_says_to_list_it(site, compose_text) -> None:
    site.plugin("quantize", "raise RuntimeError")
    said = mistake(compose_text, "model: {name: m}\nquantize: {bits: 4}\n")
    assert "a section 'quantize' (c.yaml:2)" in said
    assert "Add quantize to plugins" in said


def test_a_section_of_nothing_installed_names_what_is_near_and_the_pip_line(site, compose_text) -> None:
    site.plugin("quantize")
    said = mistake(compose_text, "model: {name: m}\nquantise: {bits: 4}\n")
    assert "unknown key 'quantise' at the top of the config (c.yaml:2)" in said
    assert "Did you mean 'quantize'" in said
    assert "pip install 'pegbox[quantise]'" in said


def test_a_misspelt_key_of_the_core_is_recognized(compose_text) -> None:
    assert "Did you mean 'output'" in mistake(compose_text, "model: {name: m}\nouput: runs/x\n")
    assert "Did you mean 'plugins'" in mistake(compose_text, "model: {name: m}\nplugin: [lora]\n")


def test_a_section_for_a_plugin_without_settings_is_an_error(compose_text) -> None:
    with pytest.raises(ConfigError, match=r"plugin 'bare' has no settings.*\(c\.yaml:3\)"):
        compose_text("model: {name: m}\nplugins: [bare]\nbare: {x: 1}\n", bare=Bare())


@pytest.mark.parametrize("name", ["model", "seed", "extends"])
def test_a_plugin_cannot_take_a_key_of_the_core(here: Path, name: str) -> None:
    (here / f"{name}.py").write_text("class Plugin:\n    pass\n")
    with pytest.raises(UserError, match=rf"'{name}'.*file {name}\.py"):
        compose({"model": {"name": "m"}, "plugins": [f"./{name}.py"]})


def test_a_plugin_listed_twice_is_an_error(lora) -> None:
    with pytest.raises(PluginError, match="two plugins are named 'lora'") as error:
        lora("", "plugins=[lora, lora]")
    assert "remove one of the two" in error.value.next


# ---- origins of the resolved config ----


def test_every_resolved_key_tells_where_it_came_from(here: Path, compose_text) -> None:
    (here / "base.yaml").write_text("seed: 4\nlora: {r: 2, alpha: 8}\n")
    text = "extends: base.yaml\n" + HEAD + "lora:\n  alpha: 4\n  sources: [{path: a}]\n"
    ctx = compose_text(text, "lora.bias=all", "output=runs/y", lora=Lora())
    found = {key: (value, str(origin)) for key, value, origin in ctx.config.origins()}
    assert found["model.name"] == ("m", "c.yaml:2")
    assert found["model.dtype"] == ("auto", "default")
    assert found["plugins.0"] == ("lora", "c.yaml:3")
    assert found["seed"] == (4, "base.yaml:1")
    assert found["output"] == ("runs/y", "command line")
    assert found["lora.r"] == (2, "base.yaml:2")
    assert found["lora.alpha"] == (4.0, "c.yaml:5")
    assert found["lora.bias"] == ("all", "command line")
    assert found["lora.sources.0.path"] == ("a", "c.yaml:6")
    assert found["lora.sources.0.format"] == (None, "default")
    assert found["lora.mix.temperature"] == (1.0, "default")
    assert found["use"] == ({}, "default")


def test_origins_cover_exactly_the_resolved_config(composed) -> None:
    ctx = composed({"lora": Lora()}, lora={"sources": [{"path": "a"}], "targets": ["q", "v"]})

    def leaves(value: object, path: str) -> dict[str, object]:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {k: v for key, item in inner for k, v in leaves(item, f"{path}.{key}").items()} or {path[1:]: value}

    assert {key: value for key, value, _ in ctx.config.origins()} == leaves(ctx.config.resolved(), "")
    assert {str(origin) for _, _, origin in ctx.config.origins()} == {"python", "default"}


# ---- reading back ----


NAMES = st.text(st.characters(max_codepoint=0x2FF, exclude_categories=["C"]), min_size=1, max_size=6)
NUMBERS = st.floats(allow_nan=False, width=32)
SECTION = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 10**20),
        "alpha": NUMBERS.filter(lambda value: value >= 1),
        "use_rslora": st.booleans(),
        "bias": st.sampled_from(["none", "all"]),
        "targets": st.just("all-linear") | st.lists(NAMES, max_size=3),
        "sources": st.lists(st.fixed_dictionaries({"path": NAMES}, optional={"format": st.none() | NAMES}), max_size=2),
        "mix": st.fixed_dictionaries({}, optional={"weights": st.dictionaries(NAMES, NUMBERS, max_size=2)}),
        "limit": st.none() | st.integers(0, 9),
    },
)


@given(
    section=SECTION,
    seed=st.integers(0, 2**63),
    output=NAMES.filter(lambda name: name[0] != "~"),
    rewards=st.dictionaries(NAMES, st.integers(0, 3), max_size=2),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_resolved_config_read_back_resolves_to_itself(tmp_path, section, seed, output, rewards) -> None:
    config = {
        "model": {"name": "m"},
        "plugins": ["lora"],
        "seed": seed,
        "output": output,
        "rewards": rewards,
        "lora": section,
    }
    first = compose(config, instances={"lora": Lora()}).config
    resolved = first.resolved()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    again = compose(tmp_path / "config.yaml", instances={"lora": Lora()}).config
    assert again.resolved() == resolved
    assert (again.run, again.sections) == (first.run, first.sections)


# ---- the core's own keys ----


def test_every_key_of_the_core_is_documented_and_defaults_are_valid() -> None:
    assert RunSection.model_validate({"model": {"name": "m"}}).seed == 0
    for section in (RunSection, RunSection.model_fields["model"].annotation):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: -1", "greater than or equal to 0"),
        ("output: ''", "at least 1 character"),
        ("loss: {sft: .nan}", "finite"),
        ("rewards: {a: .inf}", "finite"),
        ("use: {load_model: 3}", "'use.load_model' is 3"),
        ("use: [a]", "'use' is [\"a\"]"),
        ("plugins: lora", "'plugins' is \"lora\""),
        ("plugins: [3]", "'plugins.0' is 3"),
        ("resume: true", "'resume' is true"),
        ("model: {name: m, dtype: fp16}", "'bfloat16'"),
    ],
)
def test_keys_of_the_core_are_strict(compose_text, text: str, part: str) -> None:
    head = "" if text.startswith("model") else "model: {name: m}\n"
    assert part in mistake(compose_text, head + text)


def test_a_unit_and_the_documentation_of_a_setting_are_in_the_schema() -> None:
    described = Everything.model_json_schema()["properties"]
    assert described["limit"]["unit"] == "rows"
    assert described["limit"]["description"] == "At most so many rows."
    assert "unit" not in described["bias"]


def test_a_default_of_a_setting_is_validated() -> None:
    class Wrong(Section):
        rank: int = setting(0, "Rank.", ge=1)

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Wrong()
