"""The tables: what becomes of each key of another program. One TOML file for each program, in `tables`.

| part | what it says |
|---|---|
| `marks` | keys that tell the program |
| `names` | the program's key for a name that the functions use (that of transformers' TrainingArguments), where it differs |
| `defaults` | values of keys that are not set, where the program's result depends on them |
| `facts` | how the program behaves, where functions must know |
| `steps` | functions for keys that mean something only together, and the keys each reads |
| `rules` | all other keys that are mapped: the place in our config, how the value is read, a note |
| `renamed` | older spellings |
| `unneeded` | keys without a counterpart that change no result, with the reason |
| `later` | keys that are not supported yet, with what is missing |

A key that ends in `.*` stands for all below it.
"""  # noqa: E501

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

TABLES = ("axolotl", "trl", "llamafactory", "oumi")


@dataclass(frozen=True)
class Rule:
    """One key that is mapped by itself.

    Attributes:
        to: where it goes in our config, such as `trainer.micro_batch`.
        read: the name of a function in `values` that reads the value.
        note: what a reader should know; makes it "mapped with a difference" if `differs`.
        starts: the plugin of `to` becomes active by this key; otherwise the key counts only if the plugin is active.
    """

    to: str
    read: str = "plain"
    note: str = ""
    differs: bool = False
    starts: bool = False


@dataclass(frozen=True)
class Table:
    """What becomes of each key of one program."""

    name: str
    title: str
    marks: Sequence[str]
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    facts: Mapping[str, Any]
    steps: Mapping[str, Sequence[str]]
    rules: Mapping[str, Rule]
    renamed: Mapping[str, str]
    unneeded: Mapping[str, str]
    later: Mapping[str, str]

    @classmethod
    @cache
    def load(cls, name: str) -> Table:
        """The table of a program."""
        text = files("pegbox_convert").joinpath("tables", f"{name}.toml").read_text(encoding="utf-8")
        data = tomllib.loads(text)
        return cls(
            name=name,
            title=data["title"],
            marks=data["marks"],
            names=data.get("names", {}),
            defaults=data.get("defaults", {}),
            facts=data.get("facts", {}),
            steps={step: keys.split() for step, keys in data.get("steps", {}).items()},
            rules={
                key: Rule(**({"to": rule} if isinstance(rule, str) else rule)) for key, rule in data["rules"].items()
            },
            renamed=data.get("renamed", {}),
            unneeded=_by_key(data.get("unneeded", {})),
            later=_by_key(data.get("later", {})),
        )

    def key(self, name: str) -> str:
        """The program's key for a name that functions use."""
        return self.names.get(name, name)

    def step_of(self, key: str) -> str | None:
        """The function that reads a key."""
        return next((step for step, keys in self.steps.items() if matches(key, keys) is not None), None)

    def known(self) -> set[str]:
        """Every key that has an entry, without patterns."""
        keys = {*self.rules, *self.renamed, *self.unneeded, *self.later}
        keys.update(key for keys_of_step in self.steps.values() for key in keys_of_step)
        return {key.removesuffix(".*") for key in keys}

    def is_known(self, key: str) -> bool:
        """Whether the table says what becomes of a key."""
        return _is_known(self.name, key)

    def says(self, key: str) -> bool:
        """The same, looked up."""
        above = {key.rsplit(".", depth)[0] for depth in range(key.count(".") + 1)}
        if above & self.rules.keys() or key in self.renamed or self.step_of(key):
            return True
        return matches(key, self.unneeded) is not None or matches(key, self.later) is not None


def matches(key: str, patterns: Sequence[str] | Mapping[str, Any]) -> str | None:
    """The pattern that covers a key, the key itself first; None if none does."""
    if key in patterns:
        return key
    covering = (p for p in patterns if "*" in p and (fnmatchcase(key, p) or key == p.removesuffix(".*")))
    return max(covering, key=len, default=None)


@cache
def _is_known(name: str, key: str) -> bool:
    return Table.load(name).says(key)


def _by_key(groups: Mapping[str, str]) -> dict[str, str]:
    """`{reason: "key key"}` as `{key: reason}`."""
    found: dict[str, str] = {}
    for reason, keys in groups.items():
        for key in keys.split():
            if key in found:
                raise ValueError(f"{key} is listed twice: {found[key]}, {reason}")
            found[key] = reason
    return found
