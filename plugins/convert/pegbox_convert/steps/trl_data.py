"""TRL's data: a dataset by name, or a mixture, whose columns decide what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.places import first_row, place
from pegbox_convert.steps import answers
from pegbox_convert.values import flag, quiet

Entry = dict[str, Any]
GUESS = "columns decide there: rows with messages are assumed; for others set format to completion or pretraining"


def datasets(c: Conversion) -> None:
    """Training and evaluation rows, their format, and how long one may be."""
    _length(c)
    if isinstance(c.get("datasets"), list):
        c.put(
            "data.train",
            [_mixed(c, index, item) for index, item in enumerate(c.get("datasets")) if isinstance(item, dict)],
        )
        if not quiet(c.get("dataset_name")):
            c.unneeded("dataset_name", "datasets decides, there too")
    elif not quiet(c.get("dataset_name")):
        _named(c)
    if c.get("dataset_streaming") is not None and flag(c.get("dataset_streaming")):
        c.put("data.streaming", True, "dataset_streaming")
    if c.get("streaming") is not None and flag(c.get("streaming")):
        c.put("data.streaming", True, "streaming")
    size = c.get("test_split_size", "decimal")
    if size:
        c.put("data.eval_fraction", size, "test_split_size")


def _named(c: Conversion) -> None:
    name = str(c.get("dataset_name"))
    entry: Entry = {"path": place(name, c.folder), **_format(c, name, "dataset_name")}
    c.mapped("dataset_name", "data.train", "")
    if not quiet(c.get("dataset_config")):
        entry["name"] = str(c.get("dataset_config"))
        c.mapped("dataset_config", "data.train: name", "")
    split, test = str(c.get("dataset_train_split")), str(c.get("dataset_test_split"))
    for key, path in (("dataset_train_split", "data.train: split"), ("dataset_test_split", "data.eval: split")):
        if c.has(key):
            c.mapped(key, path, "")
    # Without a split all files of a folder are read, the held-out ones too.
    c.put("data.train", [entry | ({"split": split} if split != "train" or Path(name).expanduser().is_dir() else {})])
    if str(c.get("eval_strategy") or "no").lower() not in ("no", "false"):
        c.put("data.eval", [entry | {"split": test}])
    elif c.has("dataset_test_split"):
        c.unneeded("dataset_test_split", "eval_strategy is no")


def _mixed(c: Conversion, index: int, item: Entry) -> Entry:
    key = f"datasets.{index}"
    path, files = item.get("path"), item.get("data_files")
    chosen = files if files and str(path) in ("json", "csv", "parquet", "text") else path
    if isinstance(chosen, dict):
        chosen = chosen.get(item.get("split", "train"), next(iter(chosen.values())))
    listed = chosen if isinstance(chosen, list) else [chosen]
    written = [place(str(one), c.folder) for one in listed]
    entry: Entry = {"path": written[0] if len(written) == 1 else written, **_format(c, str(listed[0]), f"{key}.path")}
    known = {"path": "path", "name": "name", "split": "split", "fraction": "weight"}
    for name, value in item.items():
        if name == "data_files" and chosen is not path:
            c.mapped(f"{key}.{name}", "data.train: path", "")
        elif name == "columns":
            c.unneeded(f"{key}.{name}", "a format reads the columns it needs")
        elif name in known and value is not None:
            c.mapped(f"{key}.{name}", f"data.train: {known[name]}", "")
            if name in ("name", "split"):
                entry[name] = str(value)
            elif name == "fraction":
                entry["weight"] = float(value)
        elif name in ("data_dir", "data_files") and not quiet(value):
            c.later(f"{key}.{name}", "a folder or files inside a dataset of the hub: name files by their paths")
        elif quiet(value):
            c.unneeded(f"{key}.{name}", "empty")
    return entry


def _format(c: Conversion, path: str, key: str) -> Entry:
    """Format and options, by the columns of a local file, else by the options that only one kind of rows has."""
    row = first_row(path)
    if c.method != "sft":
        return answers.by_columns(c, row, key)
    assistant = c.get("assistant_only_loss") is not None and flag(c.get("assistant_only_loss"))
    completion = c.get("completion_only_loss")
    column = str(c.get("dataset_text_field") or "text")
    if (row is None and completion is not None) or (row is not None and {"prompt", "completion"} <= row.keys()):
        if c.has("completion_only_loss"):
            c.mapped("completion_only_loss", "data.train: options.train_on_inputs", "")
        talks = row is not None and not isinstance(row["prompt"], str)
        if talks:
            c.differs(
                key, "prompt and completion are lists of messages: write them as one list, format chat, turns last"
            )
        inputs = completion is not None and not flag(completion)
        options = ({} if talks else {"chat_template": False}) | ({"train_on_inputs": True} if inputs else {})
        return {"format": "completion", "options": options}
    if (row is None and c.has("dataset_text_field")) or (row is not None and "messages" not in row and column in row):
        if c.has("dataset_text_field"):
            c.mapped("dataset_text_field", "data.train: fields.text", "")
        options = {} if _splits(c) else {"split": False}
        fields = {"fields": {"text": column}} if column != "text" else {}
        return {"format": "pretraining", **fields, **({"options": options} if options else {})}
    if row is None and not assistant:
        c.differs(key, GUESS)
    if c.has("assistant_only_loss"):
        c.mapped("assistant_only_loss", "data.train: options.train_on_inputs", "")
    return {"format": "chat"} if assistant else {"format": "chat", "options": {"train_on_inputs": True}}


def _splits(c: Conversion) -> bool:
    return bool(c.get("packing") and flag(c.get("packing")) and c.get("packing_strategy") in ("bfd_split", "wrapped"))


def _length(c: Conversion) -> None:
    longest = c.get("max_length", "positive_whole")
    if not longest:
        c.put("data.max_length", None, "max_length")
    else:
        c.put("data.max_length", longest, "max_length")
        mode = str(c.get("truncation_mode"))
        if c.method == "reward":
            c.put("data.overlong", "drop", "max_length")
        elif mode == "keep_start":
            c.put("data.overlong", "split" if _splits(c) else "truncate", "truncation_mode")
        else:
            c.later("truncation_mode", "keeping the end of long rows")
    if not (c.get("packing") and flag(c.get("packing"))):
        return
    strategy = str(c.get("packing_strategy"))
    if not longest:
        c.later("packing", "packing without a length")
        return
    c.put("packing.length", longest, "packing", "max_length")
    if strategy in ("bfd", "bfd_split"):
        if c.has("packing_strategy"):
            c.mapped("packing_strategy", "packing.length", "best fit, in windows of rows here")
    else:
        c.later("packing_strategy", f"the strategy {strategy}, which cuts rows anywhere: rows stay whole")
    if c.get("eval_packing") is not None:
        c.put("packing.eval", flag(c.get("eval_packing")), "eval_packing")
