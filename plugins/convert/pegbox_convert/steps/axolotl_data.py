"""Axolotl's lists of datasets: each entry's type, fields and options as ours."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.places import place
from pegbox_convert.steps import axolotl_answers
from pegbox_convert.steps.methods import ONLINE, OTHER
from pegbox_convert.steps.modelling import TEMPLATES
from pegbox_convert.values import flag, mapping, names, quiet

Entry = dict[str, Any]
ROLES = {"human": "user", "gpt": "assistant"}
"""Roles that Axolotl knows under other names unless the config says otherwise."""
FIELDS = {
    "field_messages": "messages",
    "field_tools": "tools",
    "field_thinking": "reasoning",
    "field_system": "system",
    "message_field_training": "train",
    "message_field_training_detail": "train_detail",
    "message_field_role": "role",
    "message_field_content": "content",
}
"""Names of columns in chat data, and our names of the same fields."""
PROPERTIES = {"role": "role", "content": "content", "tool_calls": "tool_calls", "thinking": "reasoning"}
PROPERTIES |= {"reasoning_content": "reasoning", "weight": "weight", "train": "train"}
OPTIONS = {
    "roles_to_train": "train_roles",
    "train_on_eos": "train_end_of_sequence",
    "train_on_eot": "train_end_of_turn",
    "drop_system_message": "drop_system",
    "split_thinking": "split_thinking",
    "chat_template_kwargs": "template_kwargs",
}
"""Options of chat data that each have a counterpart."""
TYPES = {"alpaca": "alpaca", "completion": "pretraining", "pretrain": "pretraining", "input_output": "input_output"}
SOURCES = {"json": "", "parquet": "parquet", "arrow": "arrow", "csv": "csv", "text": "text"}
SYNTHETIC = {"length": "rows", "seed": "seed"}


def datasets(c: Conversion) -> None:
    """All lists of datasets, what is held out, and what happens to rows that are too long."""
    _length(c)
    found = _entries(c, "datasets") + _entries(c, "pretraining_dataset")
    streaming = c.has("pretraining_dataset") or (c.get("streaming") is not None and flag(c.get("streaming")))
    if found:
        c.put("data.train", found)
    if streaming:
        c.put("data.streaming", True, *[name for name in ("streaming", "pretraining_dataset") if c.has(name)][:1])
    tests = _entries(c, "test_datasets")
    if tests:
        c.put("data.eval", tests)
    size = c.get("val_set_size", "number") or 0
    if size:
        path, value = ("data.eval_fraction", float(size)) if size < 1 else ("data.eval_rows", int(size))
        c.put(path, value, "val_set_size")
    elif c.has("val_set_size"):
        c.unneeded("val_set_size", "nothing is held out")


def _length(c: Conversion) -> None:
    length = c.get("sequence_len", "whole")
    if c.method in ONLINE:
        if c.has("sequence_len"):
            c.unneeded("sequence_len", "prompts are not cut there; completions have a length of their own")
        return
    c.put("data.max_length", length, "sequence_len")
    strategy = str(c.get("excess_length_strategy"))
    overlong = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(strategy)
    if overlong is None:
        c.later("excess_length_strategy", f"the strategy {strategy}")
    else:
        c.put("data.overlong", overlong, "excess_length_strategy")
    packed = c.get("sample_packing")
    if packed is not None and flag(packed):
        c.put("packing.length", length, "sequence_len", "sample_packing")
        evaluated = c.get("eval_sample_packing")
        if evaluated is not None:
            c.put("packing.eval", flag(evaluated), "eval_sample_packing")


def _entries(c: Conversion, name: str) -> list[Entry]:
    """The entries of one list; every key of each is reported."""
    listed = c.get(name)
    if quiet(listed):
        return []
    if isinstance(listed, str):
        listed = [{"path": listed, "type": "pretrain"}]
        c.foreign.tree[name] = listed
        c.foreign.written[f"{name}.0.path"] = c.foreign.written[f"{name}.0.type"] = name
    entries = []
    for index, item in enumerate(listed):
        if not isinstance(item, dict):
            c.later(name, "an entry that is no mapping", key=f"{name}.{index}")
            continue
        entries += Reading(
            c, f"{name}.{index}", dict(item), "data.eval" if name == "test_datasets" else "data.train"
        ).read()
    return entries


class Reading:
    """One entry while it is read: keys are taken out of it one by one, and the rest is looked up as unknown."""

    def __init__(self, c: Conversion, key: str, item: Entry, ours: str) -> None:
        self.c, self.key, self.item, self.ours = c, key, item, ours
        self.entry: Entry = {}
        self.fields: dict[str, str] = {}
        self.options: Entry = {}

    def take(self, name: str, where: str, note: str = "", *, differs: bool = False) -> Any:
        """The value of a key, reported as mapped to a part of our entry; None if it is not there."""
        if name not in self.item:
            return None
        value = self.item.pop(name)
        full = f"{self.key}.{name}"
        if value is None:
            self.c.unneeded(full, "empty")
        elif differs:
            self.c.differs(full, f"{self.ours}: {where}; {note}" if note else f"{self.ours}: {where}")
        else:
            self.c.mapped(full, f"{self.ours}: {where}", note)
        return value

    def later(self, name: str, why: str) -> None:
        self.item.pop(name, None)
        self.c.later(f"{self.key}.{name}", why)

    def read(self) -> list[Entry]:
        """Our entries: one, or one for each name of a hub dataset."""
        self._place()
        self._type()
        for name in list(self.item):
            self._rest(name)
        entry = {**self.entry, **({"fields": self.fields} if self.fields else {})}
        entry |= {"options": self.options} if self.options else {}
        listed = entry.get("name")
        return [{**entry, "name": one} for one in listed] if isinstance(listed, list) else [entry]

    def _place(self) -> None:
        path, files = self.take("path", "path"), self.take("data_files", "path")
        kind = self.take("ds_type", "source")
        chosen = files if files else path
        written = [place(str(one), self.c.folder) for one in (chosen if isinstance(chosen, list) else [chosen])]
        self.entry["path"] = written[0] if len(written) == 1 else written
        if path == "synthetic":
            self._synthetic()
        elif kind and SOURCES.get(str(kind), "json"):
            self.entry["source"] = str(kind)
        for name in ("name", "split", "revision"):
            value = self.take(name, name)
            if value is not None:
                self.entry[name] = value if isinstance(value, list) else str(value)
        weight = self.take("weight", "weight")
        if weight is not None:
            self.entry["weight"] = float(weight)

    def _synthetic(self) -> None:
        self.entry = {"source": "synthetic", "source_options": {}}
        for theirs, ours in SYNTHETIC.items():
            value = self.take(theirs, f"source_options.{ours}")
            if value is not None:
                self.entry["source_options"][ours] = value
        for name in list(self.item):
            if name != "type":
                self.later(name, "this option of synthetic rows: ours are conversations")

    def _type(self) -> None:
        kind = self.item.get("type")
        if self.c.method not in ("sft", OTHER):
            axolotl_answers.read(self, kind)
            return
        if isinstance(kind, dict):
            self._own_prompt(kind)
            return
        word = str(kind or "").split(":")[0]
        base = word.removesuffix(".default")
        if not word and "path" in self.entry:
            self.c.by_default(
                f"{self.key}.type", "tokens", f"{self.ours}: format", "rows without a type are tokenized ones"
            )
            self.entry["format"] = "tokens"
        elif base == "chat_template" or word.startswith("sharegpt"):
            old = word.startswith("sharegpt")
            self.take("type", "format", "Axolotl has replaced sharegpt by chat_template" if old else "")
            self.entry["format"] = "chat"
            self.fields |= {"messages": "conversations", "role": "from", "content": "value"} if old else {}
            self._chat()
        elif base in TYPES:
            self.take("type", "format")
            self.entry["format"] = TYPES[base]
            self._text(base)
        elif word == "_synthetic":
            self.take("type", "format")
            self.entry["format"] = "chat"
        else:
            self.later("type", f"the dataset type {word}".strip())
            self.entry["format"] = "chat"

    def _text(self, kind: str) -> None:
        field = self.take("field", "fields.text") or self.take("text_column", "fields.text")
        if field and field != "text":
            self.fields["text"] = str(field)
        if kind == "alpaca":
            self._inputs()

    def _chat(self) -> None:
        c = self.c
        for theirs, ours in FIELDS.items():
            value = self.take(theirs, f"fields.{ours}")
            if value:
                self.fields[ours] = str(value)
        mapped = mapping(self.item.pop("message_property_mappings", None) or {})
        for theirs, column in mapped.items():
            key = f"{self.key}.message_property_mappings.{theirs}"
            if theirs in PROPERTIES:
                c.mapped(key, f"{self.ours}: fields.{PROPERTIES[theirs]}", "")
                if column != PROPERTIES[theirs]:
                    self.fields[PROPERTIES[theirs]] = str(column)
            else:
                c.later(key, "this property of a message")
        roles = self.take("roles", "options.roles")
        pairs = [(there, ours) for ours, listed in mapping(roles or {}).items() for there in names(listed)]
        known = {there: ours for there, ours in pairs if there != ours} if roles else ROLES
        self.options |= {"roles": known} if known else {}
        self._chat_options()

    def _chat_options(self) -> None:
        c = self.c
        for theirs, ours in OPTIONS.items():
            value = self.take(theirs, f"options.{ours}")
            if value is not None:
                self.options[ours] = value
        if "train_end_of_sequence" in self.options and "train_end_of_turn" not in self.options:
            self.options["train_end_of_turn"] = self.options.pop("train_end_of_sequence")
        for name, option in (("chat_template_kwargs", "template_kwargs"), ("default_system_message", "default_system")):
            value = c.get(name)
            if not quiet(value) and option not in self.options:
                self.options[option] = value
                c.mapped(c.table.key(name), f"{self.ours}: options.{option}", "")
        self._inputs()
        self._own_template()

    def _inputs(self) -> None:
        """Whether prompts are trained too."""
        inputs = self.c.get("train_on_inputs")
        if inputs is not None and flag(inputs):
            self.options["train_on_inputs"] = True
            self.c.mapped("train_on_inputs", f"{self.ours}: options.train_on_inputs")

    def _own_template(self) -> None:
        own = self.item.get("chat_template")
        if own is None:
            return
        if str(own) == "tokenizer_default" or own == self.c.get("chat_template"):
            self.item.pop("chat_template")
            self.c.unneeded(f"{self.key}.chat_template", "the one of the whole run")
        elif not self.c.has("chat_template") and str(own) in TEMPLATES:
            self.take("chat_template", "hf.chat_template")
            self.c.start("templates")
            self.c.put("hf.chat_template", TEMPLATES[str(own)])
        else:
            self.later("chat_template", "a template for one dataset: a run has one")

    def _own_prompt(self, kind: Entry) -> None:
        """A prompt written into the config: instruction, input and output in a text of one's own."""
        base = f"{self.key}.type"
        self.item.pop("type")
        self.entry["format"] = "alpaca"
        kind = dict(kind)
        for name in ("instruction", "input", "output", "system"):
            column = kind.pop(f"field_{name}", None)
            if column:
                self.c.mapped(f"{base}.field_{name}", f"{self.ours}: fields.{name}", "")
                self.fields |= {name: str(column)} if column != name else {}
        system = str(kind.get("system_format") or "{system}")
        given = bool(kind.get("system_prompt") or "system" in self.fields or "system_format" in kind)
        head = system if given else ""
        form = str(kind.get("format") or "{instruction} {input} ")
        self.options |= {
            "prompt": head + form,
            "prompt_no_input": head + str(kind.get("no_input_format") or "{instruction} "),
        }
        if kind.get("system_prompt") is not None:
            self.options["system"] = str(kind["system_prompt"])
        places = {
            "system_format": "prompt",
            "format": "prompt",
            "no_input_format": "prompt_no_input",
            "system_prompt": "system",
        }
        for name in list(kind):
            if name in places:
                self.c.mapped(f"{base}.{name}", f"{self.ours}: options.{places[name]}", "")
            else:
                self.c.later(f"{base}.{name}", "this part of a prompt")
        self._text("alpaca")

    def _rest(self, name: str) -> None:
        """A key of an entry that nothing above has taken."""
        general = f"datasets.*.{name}"
        full, value = f"{self.key}.{name}", self.item[name]
        table = self.c.table
        if general in table.later:
            self.c.unneeded(full, "switched off") if quiet(value) else self.later(name, table.later[general])
        elif general in table.unneeded:
            self.c.unneeded(full, table.unneeded[general])
        elif general in table.steps["datasets"] or name in OPTIONS or name in FIELDS:
            self.c.unneeded(full, "has no effect on this type")
        elif quiet(value):
            self.c.unneeded(full, "empty")
