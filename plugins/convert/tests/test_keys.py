"""Every key of the other programs has an entry in its table, and every place that a table names exists here."""

from __future__ import annotations

import importlib
import re
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from pegbox.discovery import discover, load
from pegbox_convert import ours
from pegbox_convert.conversion import Conversion, Status
from pegbox_convert.foreign import Foreign, rename
from pegbox_convert.steps import steps_of
from pegbox_convert.steps.methods import defaults
from pegbox_convert.steps.modelling import TEMPLATES
from pegbox_convert.steps.optimization import SCHEDULES, optimizers
from pegbox_convert.table import TABLES, Table
from pegbox_convert.values import READERS

NAMES = Path(__file__).parent / "names"
ASSUMED = {"training.save_strategy", "hub_private_repo"}
"""What a program does without a key for it."""
LISTS = {"axolotl": "axolotl-0.21.0.txt", "oumi": "oumi-0.9.txt", "llamafactory": "llamafactory-0.9.5.txt"}


def listed(program: str) -> list[str]:
    lines = (NAMES / LISTS[program]).read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def status_of(program: str, key: str) -> Status:
    """What becomes of a key that stands alone in a config, with a value that switches something on."""
    key = re.sub(r"\.\d+", ".0", key)
    value: object = "some"
    for part in reversed(key.split(".")):
        value = [value] if part.isdecimal() else {part: value}
    foreign, table = Foreign(value if isinstance(value, dict) else {}), Table.load(program)
    rename(foreign, table)
    conversion = Conversion(foreign, table, Path())
    conversion.finish(steps_of(program))
    return conversion.entries[key].status


@pytest.mark.parametrize("program", LISTS)
def test_every_key_of_the_other_program_is_known(program: str) -> None:
    unknown = [key for key in listed(program) if status_of(program, key) is Status.UNKNOWN]
    assert not unknown


def trainers() -> dict[str, type]:
    trl = importlib.import_module("trl")
    found = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "reward": trl.RewardConfig}
    found |= {"grpo": trl.GRPOConfig, "rloo": trl.RLOOConfig}
    for name in ("orpo", "cpo"):
        module = importlib.import_module(f"trl.experimental.{name}.{name}_config")
        found[name] = getattr(module, f"{name.upper()}Config")
    return found


def test_every_field_of_trl_is_known() -> None:
    trl = importlib.import_module("trl")
    online = importlib.import_module("trl.scripts.grpo").GRPOScriptArguments
    dataclasses = (trl.SFTConfig, trl.ModelConfig, online, trl.DatasetMixtureConfig, *trainers().values())
    names = {field.name for one in dataclasses for field in fields(one)}
    entries = fields(importlib.import_module("trl.scripts.utils").DatasetConfig)
    names |= {f"datasets.0.{field.name}" for field in entries} - {"datasets"}
    assert len(names) > 150
    assert not [name for name in sorted(names) if status_of("trl", name) is Status.UNKNOWN]


def test_defaults_of_trl_are_those_of_its_dataclasses() -> None:
    trl = importlib.import_module("trl")
    defaults = Table.load("trl").defaults
    known = {
        field.name: field.default
        for one in (trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments)
        for field in fields(one)
    }
    ours_alone = {"output_dir": "trainer_output", "save_total_limit": 0}
    for name, value in defaults.items():
        expected = ours_alone.get(name, known[name])
        assert getattr(expected, "value", expected) == value, name


def test_defaults_of_methods_are_those_of_trls_trainers() -> None:
    ours_alone = {"pref_loss", "objective", "max_length", "center_rewards_coefficient", "min_p"}
    for method, config in trainers().items():
        known = {field.name: field for field in fields(config)}
        listed = {**defaults()[method]["defaults"], **defaults()[method]["trl"]}
        for name, value in listed.items():
            if name in ours_alone:
                continue
            field = known[name]
            default = field.default if field.default_factory is MISSING else field.default_factory()
            assert getattr(default, "value", default) == value, (method, name)


@pytest.mark.parametrize("program", TABLES)
def test_every_place_that_a_rule_names_exists(program: str) -> None:
    for key, rule in Table.load(program).rules.items():
        section, *path = rule.to.split(".")
        assert rule.read in READERS
        if section in ours.CORE:
            continue
        schema = ours.schema(section)
        assert schema is not None, key
        assert path[0] in schema.model_fields, key


@pytest.mark.parametrize("program", TABLES)
def test_every_step_of_a_table_is_a_function(program: str) -> None:
    table = Table.load(program)
    assert not set(table.steps) - set(steps_of(program))
    assert [key for key in {*table.names.values(), *table.defaults} - ASSUMED if not table.is_known(key)] == []


@pytest.mark.parametrize("program", TABLES)
def test_older_names_lead_to_known_ones(program: str) -> None:
    table = Table.load(program)
    assert [new for new in table.renamed.values() if not table.is_known(new)] == []


def items_of(kind: str) -> dict[str, object]:
    installed, found = discover(), {}
    for plugin in ("optim", "bnb-optim", "schedule-free", "torchao-optim", "pytorch-optimizer", "templates"):
        _, instance = load(plugin, installed, Path())
        found.update({item.name: item.target for item in instance.register_items() if item.kind == kind})
    return found


def test_optimizers_schedules_and_templates_exist_with_their_options() -> None:
    recipes = items_of("optimizer")
    for name, entry in optimizers().items():
        recipe = recipes[entry["name"]]
        if isinstance(recipe, str):
            module, _, attribute = recipe.partition(":")
            recipe = getattr(importlib.import_module(module), attribute)
        known = recipe.options.model_fields
        takes = [option.removesuffix("3") for option in entry.get("takes", ["betas", "eps"])]
        assert {*takes, *entry.get("arguments", [])} <= known.keys(), name
        if "betas" in takes:
            assert list(known["betas"].default) == entry.get(
                "betas", [0.9, 0.999, 0.9999][: len(known["betas"].default)]
            ), name
        if "eps" in takes:
            assert known["eps"].default == entry.get("eps", 1e-8), name
    assert set(SCHEDULES) <= items_of("schedule").keys()
    assert set(TEMPLATES.values()) <= items_of("template").keys()


def test_plugins_that_are_written_have_a_place_in_the_order() -> None:
    written = {rule.to.split(".")[0] for name in TABLES for rule in Table.load(name).rules.values()} - set(ours.CORE)
    written |= {entry["plugin"] for entry in optimizers().values() if "plugin" in entry}
    assert written <= set(ours.ORDER)
    assert set(ours.ORDER) <= set(discover())
