"""Axolotl's dataset types of preferences, labelled answers, reward models and prompts.

A type is a template, `chatml` or `llama3`, and the layout of the columns: `chatml.intel`. Here the template is the
run's, and the layout an option of the format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pegbox_convert.steps.answers import format_of
from pegbox_convert.steps.methods import ONLINE
from pegbox_convert.steps.modelling import TEMPLATES
from pegbox_convert.values import mapping, names

if TYPE_CHECKING:
    from pegbox_convert.steps.axolotl_data import Reading

LAYOUTS = ("argilla", "argilla_chat", "icr", "intel", "prompt_pairs", "ultra", "nectar")
LABELLED = ("argilla", "argilla_chat", "intel", "prompt_pairs", "ultra")
TRANSFORM = (
    "rows made by a function: write its result into a file with the column prompt and those that rewards read "
    "(data.columns)"
)
ANSWERS = {"field_chosen": "chosen", "field_rejected": "rejected", "field_messages": "prompt"}
ROLES = {"message_field_role": "role", "message_field_content": "content"}
OWN = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected", "field_system": "system"}
OWN |= {"field_completion": "completion", "field_label": "label"}


def read(entry: Reading, kind: Any) -> None:
    """Format, fields and options of an entry whose method is not supervised training."""
    c = entry.c
    entry.entry["format"] = format_of(c)
    if isinstance(kind, dict):
        _own(entry, dict(kind))
    elif c.method in ONLINE:
        entry.later("type", TRANSFORM) if kind else None
    elif c.method == "prm":
        _steps(entry, str(kind or ""))
    elif not kind:
        c.by_default(f"{entry.key}.type", entry.entry["format"], f"{entry.ours}: format", "columns of the usual names")
    else:
        _named(entry, str(kind))
    given = c.get("default_system_message")
    if given and "system" not in entry.fields and c.method != "prm":
        entry.options["default_system"] = str(given)
        c.mapped("default_system_message", f"{entry.ours}: options.default_system")


def _named(entry: Reading, kind: str) -> None:
    c = entry.c
    template, _, layout = kind.partition(".")
    if template == "bradley_terry":
        template, _, layout = layout.partition(".")
        layout = {"": "icr", "default": "icr"}.get(layout, layout)
    allowed = LABELLED if c.method == "kto" else LAYOUTS
    if template not in ("chat_template", "chatml", "llama3", "zephyr", "passthrough") or (
        layout not in (*allowed, "", "default")
    ):
        entry.later("type", f"the dataset type {kind}: name its columns in fields, or a layout in options")
        return
    note, differs = "", False
    if layout == "nectar":
        note, differs = "the best and the worst answer; there the two that are ranked lowest", True
    if template == "passthrough":
        entry.options["chat_template"] = False
        note, differs = "an end token follows an answer, unless it is there", True
    entry.take("type", "format, options.layout", note, differs=differs)
    # The conversation stands in both answers there.
    layout = "argilla_chat" if kind == "chat_template.argilla" else layout
    if layout not in ("", "default"):
        entry.options["layout"] = layout
    _template(entry, template)
    _fields(entry, messages=kind.startswith("chat_template") and layout in ("", "default"))


def _template(entry: Reading, template: str) -> None:
    """The template of a type is that of the run, unless the run has one."""
    c = entry.c
    if template in TEMPLATES and not c.has("chat_template"):
        c.start("templates")
        c.put("hf.chat_template", TEMPLATES[template])
        c.differs(f"{entry.key}.type", f"the template {template} of Pegbox; its text may differ in details")


def _fields(entry: Reading, *, messages: bool) -> None:
    if messages:
        entry.fields["prompt"] = "messages"
    for theirs, ours in {**ANSWERS, **ROLES}.items():
        column = entry.take(theirs, f"fields.{ours}")
        if column:
            entry.fields[ours] = str(column)
    pairs = mapping(entry.item.pop("message_property_mappings", None) or {})
    for theirs, column in pairs.items():
        entry.c.mapped(f"{entry.key}.message_property_mappings.{theirs}", f"{entry.ours}: fields.{theirs}")
        if theirs != column:
            entry.fields[theirs] = str(column)
    roles = entry.take("roles", "options.roles")
    known = {there: ours for ours, listed in mapping(roles or {}).items() for there in names(listed) if there != ours}
    entry.options |= {"roles": known} if known else {}
    if entry.item.get("chat_template") is not None and entry.item["chat_template"] == entry.c.get("chat_template"):
        entry.item.pop("chat_template")
        entry.c.unneeded(f"{entry.key}.chat_template", "the one of the whole run")


def _steps(entry: Reading, kind: str) -> None:
    if kind in ("stepwise_supervised", ""):
        entry.take("type", "format")
    else:
        entry.later("type", f"the dataset type {kind}: rows of prompt, completions and labels are the format steps")
    for name in ("step_separator", "train_on_last_step_only"):
        value = entry.take(name, f"options.{name}")
        if value is not None:
            entry.options[name] = value
    if "max_completion_length" in entry.item:
        entry.later("max_completion_length", "steps are never cut: data.max_length and overlong: drop leave rows out")


def _own(entry: Reading, kind: dict[str, Any]) -> None:
    """A type written into the config: columns, and what texts are put into."""
    c, base = entry.c, f"{entry.key}.type"
    entry.item.pop("type")
    entry.options["chat_template"] = False
    for theirs, ours in OWN.items():
        column = kind.pop(theirs, None)
        if column:
            c.mapped(f"{base}.{theirs}", f"{entry.ours}: fields.{ours}")
            entry.fields |= {ours: str(column)} if column != ours else {}
    if kind.get("prompt_format"):
        c.mapped(f"{base}.prompt_format", f"{entry.ours}: options.prompt_format")
        entry.options["prompt_format"] = str(kind.pop("prompt_format"))
    forms = {name: str(kind.pop(name)) for name in list(kind) if name.endswith("_format") and kind[name]}
    written = {form.replace(f"{{{name.removesuffix('_format')}}}", "{answer}") for name, form in forms.items()}
    for name in forms:
        if len(written) == 1:
            c.mapped(f"{base}.{name}", f"{entry.ours}: options.answer_format")
        else:
            c.later(f"{base}.{name}", "answers of two forms: write them into the file, or give both one form")
    if len(written) == 1:
        entry.options["answer_format"] = written.pop()
    for name, value in kind.items():
        if value in (None, "", name):
            c.unneeded(f"{base}.{name}", "empty")
        else:
            c.later(f"{base}.{name}", "this part of a type")
