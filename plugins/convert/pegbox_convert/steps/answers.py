"""Rows of preferences, of answers with labels, and of prompts: format, fields and options of an entry."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps.methods import FORMATS, ONLINE
from pegbox_convert.values import mapping, quiet

Entry = dict[str, Any]
GUESS = (
    "columns decide there: rows of messages under the usual names are assumed; for plain texts set options: "
    "{chat_template: false}"
)
FACTORY_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}


def format_of(c: Conversion) -> str:
    """The format of the method's rows."""
    return FORMATS.get(c.method, "preference" if c.method != "other" else "chat")


def overlong(c: Conversion) -> str:
    """What TRL's trainers do with rows that are too long."""
    return "drop" if c.method == "reward" else "truncate"


def by_columns(c: Conversion, row: Entry | None, key: str) -> Entry:
    """TRL's rows: columns say what they are, of a local file here too."""
    entry: Entry = {"format": format_of(c)}
    options: Entry = {}
    if row is None:
        c.differs(key, GUESS)
    else:
        sides = [row[name] for name in ("prompt", "completion", "chosen", "rejected") if name in row]
        if entry["format"] != "steps" and not any(isinstance(side, list) for side in sides):
            options["chat_template"] = False
        if c.method == "kto" and "label" not in row and {"chosen", "rejected"} <= row.keys():
            options["unpair"] = True
        if c.method == "reward" and "margin" in row:
            c.put("reward.margin", True, note="rows have margins")
            c.put("data.columns", ["margin"])
        if c.method in ONLINE:
            c.columns |= row.keys() - {"prompt"}
    given = c.get("chat_template_kwargs")
    if not quiet(given):
        options["template_kwargs"] = mapping(given)
        c.mapped(c.table.key("chat_template_kwargs"), "data.train: options.template_kwargs")
    return {**entry, "options": options} if options else entry


def registered(c: Conversion, key: str, entry: Entry, about: Entry) -> Entry:
    """A dataset of LLaMA-Factory's dataset_info.json: ranked answers, or answers with a tag."""
    columns, tags = dict(about.get("columns", {})), about.get("tags", {})
    chat = about.get("formatting") == "sharegpt"
    entry = {**entry, "format": format_of(c)}
    options: Entry = {}
    usual = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label", "system": "system", "tools": "tools"}
    if chat:
        usual["messages"] = "completion" if c.method == "kto" else "prompt"
        fields = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value")}
        columns.setdefault("messages", "conversations")
        roles = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
        options["roles"] = FACTORY_ROLES | {
            str(tags[tag]): role for tag, role in roles.items() if tag in tags and tags[tag] != role
        }
    else:
        usual |= {"prompt": "prompt", "query": "query", "response": "completion"}
        fields = {}
        columns.setdefault("prompt", "instruction")
    fields |= {usual[there]: str(column) for there, column in columns.items() if there in usual}
    if c.method == "kto" and chat:
        # Without the prompt's column the completion holds the conversation.
        fields["prompt"] = ""
    others = sorted({*columns} - {*usual})
    if others:
        c.later(key, f"columns of dataset_info.json: {', '.join(others)}; join them with the prompt in the file")
    kept = {ours: column for ours, column in fields.items() if ours != column}
    return {**entry, **({"fields": kept} if kept else {}), **({"options": options} if options else {})}
