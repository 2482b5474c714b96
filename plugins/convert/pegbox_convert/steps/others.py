"""Data, stage and precision of LLaMA-Factory and Oumi."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.places import place
from pegbox_convert.steps import answers
from pegbox_convert.steps.methods import ONLINE
from pegbox_convert.values import flag, mapping, names, quiet

Entry = dict[str, Any]
REGISTRY = "names are looked up in dataset_info.json, which is not there: set path and format"
CLASSES = {
    "text_sft": "chat",
    "text_sft_jsonl": "chat",
    "PromptResponseDataset": "completion",
    "yahma/alpaca-cleaned": "alpaca",
    "tatsu-lab/alpaca": "alpaca",
    "text_jsonlines": "pretraining",
}
"""Datasets of Oumi's registry whose rows have a format of ours; others are conversations."""
SHAREGPT = {"messages": "conversations", "role": "from", "content": "value"}


def mixed(c: Conversion) -> None:
    """Oumi: what the forward computes in, and in which type weights are loaded."""
    word = str(c.get("mixed_precision_dtype") or "none").lower().rpartition(".")[2]
    known = {"none": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}
    chosen = c.get("dtype", "dtype") or "auto"
    if word == "none" and chosen == "bfloat16":
        c.put("trainer.precision", "bf16", "dtype", note="the model itself is bf16 there")
        c.unneeded("mixed_precision_dtype", "torch_dtype_str decides") if c.has("mixed_precision_dtype") else None
    else:
        c.put("trainer.precision", known.get(word, "auto"), "mixed_precision_dtype")
    if "lora" in c.plugins:
        c.put("model.dtype", chosen, "dtype")
    elif chosen in ("auto", "float16"):
        c.put("hf.trainable_dtype", "float32", "dtype", note="trained in fp32", differs=True)
    else:
        c.put("hf.trainable_dtype", chosen, "dtype")


def oumi_datasets(c: Conversion) -> None:
    """Oumi's splits: lists of datasets, the collator that says what is trained, packing."""
    longest = c.get("max_length", "positive_whole")
    if c.method in ONLINE and longest:
        c.unneeded("max_length", "prompts are not cut there")
    elif longest:
        c.put("data.max_length", longest, "max_length")
        c.put("data.overlong", answers.overlong(c), "max_length")
    for split, ours in (("train", "data.train"), ("validation", "data.eval")):
        listed = c.get(f"data.{split}.datasets")
        entries = [
            _oumi(c, split, index, item) for index, item in enumerate(listed if isinstance(listed, list) else ())
        ]
        if entries:
            c.put(ours, entries)
    if c.get("packing") is not None and flag(c.get("packing")):
        if longest:
            c.put("packing.length", longest, "packing", "max_length")
            held_out = c.get("data.validation.pack")
            c.put("packing.eval", bool(held_out and flag(held_out)), "data.validation.pack")
        else:
            c.later("packing", "packing without model.model_max_length: set packing.length")
    if c.get("streaming") is not None and flag(c.get("streaming")):
        c.put("data.streaming", True, "streaming")


def _oumi(c: Conversion, split: str, index: int, item: Entry) -> Entry:
    key, ours = f"data.{split}.datasets.{index}", "data.eval" if split == "validation" else "data.train"
    options = mapping(item.get("dataset_kwargs") or {})
    name = str(item.get("dataset_name"))
    path = str(item.get("dataset_path") or options.get("hf_dataset_path") or name)
    entry: Entry = {"path": place(path, c.folder), "format": CLASSES.get(name, "chat")}
    if c.method != "sft":
        entry["format"] = answers.format_of(c)
    for given, places in (("dataset_name", "format"), ("dataset_path", "path"), ("subset", "name"), ("split", "split")):
        if not quiet(item.get(given)):
            c.mapped(f"{key}.{given}", f"{ours}: {places}", "")
            if given in ("subset", "split"):
                entry[places] = str(item[given])
    if c.method != "sft":
        c.differs(f"{key}.dataset_name", answers.GUESS)
    elif name not in CLASSES:
        c.differs(f"{key}.dataset_name", "its class decides what a row is: rows with messages are assumed")
    if not quiet(item.get("sample_count")):
        c.mapped(f"{key}.sample_count", f"{ours}: limit", "the first rows")
        entry["limit"] = int(item["sample_count"])
    fields = {"prompt_column": "prompt", "response_column": "completion", "messages_column": "messages"}
    for option, value in options.items():
        full = f"{key}.dataset_kwargs.{option}"
        if option in fields:
            c.mapped(full, f"{ours}: fields.{fields[option]}", "")
            entry.setdefault("fields", {})[fields[option]] = str(value)
        elif option == "hf_dataset_path":
            c.mapped(full, f"{ours}: path", "")
        else:
            c.later(full, "this argument of a dataset class")
    for name_, why in (("mixture_proportion", "mixing by proportion (weight of an entry)"), ("shuffle", "")):
        if not quiet(item.get(name_)):
            c.later(f"{key}.{name_}", why or "shuffling one dataset (trainer.shuffle shuffles all)")
    for other in ("shuffle_buffer_size", "seed", "transform_num_workers", "trust_remote_code"):
        if other in item:
            c.unneeded(f"{key}.{other}", "not needed here")
    return entry | (_masked(c, split, entry["format"]) if c.method == "sft" else {})


def _masked(c: Conversion, split: str, kind: str) -> Entry:
    collator, target = c.get(f"data.{split}.collator_name"), c.get(f"data.{split}.train_target")
    only = str(collator or "") in ("text_completions_only_with_padding",)
    options: Entry = {} if only or kind == "pretraining" else {"train_on_inputs": True}
    if collator is not None:
        known = ("text_completions_only_with_padding", "text_with_padding")
        if str(collator) in known:
            c.mapped(f"data.{split}.collator_name", "options.train_on_inputs", "")
        else:
            c.later(f"data.{split}.collator_name", f"the collator {collator}")
    if target is not None:
        last = "final" in str(target)
        c.mapped(f"data.{split}.train_target", "options.turns", "")
        options = {"turns": "last"} if last else {}
    for leaf in c.foreign.leaves(f"data.{split}.collator_kwargs"):
        c.unneeded(leaf, "the template tells where answers are: no text is searched for")
    return {"options": options} if options else {}


def factory_stage(c: Conversion) -> None:
    """LLaMA-Factory: weights in bf16, and its scale of adapters."""
    if c.get("pure_bf16") is not None and flag(c.get("pure_bf16")):
        c.put("trainer.precision", "bf16", "pure_bf16")
        c.put("lora.dtype" if "lora" in c.plugins else "hf.trainable_dtype", "bfloat16", "pure_bf16")
    alpha = c.get("lora_alpha")
    if "lora" in c.plugins and alpha is None:
        c.put("lora.alpha", 2.0 * c.get("lora_rank", "whole"), "lora_alpha", note="twice the rank")


def factory_datasets(c: Conversion) -> None:
    """LLaMA-Factory's datasets by name, through dataset_info.json where it is found."""
    longest = c.get("max_length", "whole")
    c.put("data.max_length", longest, "max_length")
    c.put(
        "data.overlong", "truncate", "max_length", note="there question and answer are cut in proportion", differs=True
    )
    info = _registry(c)
    for name, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        if not quiet(c.get(name)):
            c.put(ours, [_registered(c, name, one, info) for one in names(c.get(name))])
            c.mapped(name, ours, "")
    if info is not None or c.has("dataset_dir"):
        c.mapped("dataset_dir", "data.train: path", "") if c.has("dataset_dir") else None
    size = c.get("val_size", "number") or 0
    if size:
        path, value = ("data.eval_fraction", float(size)) if size < 1 else ("data.eval_rows", int(size))
        c.put(path, value, "val_size")
    if c.get("max_samples") is not None:
        c.put("data.limit", c.get("max_samples", "whole"), "max_samples")
    if c.get("streaming") is not None and flag(c.get("streaming")):
        c.put("data.streaming", True, "streaming")
    neat, packed = c.get("neat_packing"), c.get("packing")
    if (neat is not None and flag(neat)) or (packed is not None and flag(packed)):
        note = (
            "" if neat is not None and flag(neat) else "there rows of a bin see each other; here never (neat_packing)"
        )
        c.put("packing.length", longest, "packing", "neat_packing", note=note, differs=bool(note))


def _registry(c: Conversion) -> Entry | None:
    path = Path(str(c.get("dataset_dir"))) / "dataset_info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _registered(c: Conversion, key: str, name: str, info: Entry | None) -> Entry:
    options = _factory_options(c, key) if c.method == "sft" else {}
    rows = {} if c.method == "sft" else {"format": answers.format_of(c)}
    if info is None or name not in info:
        c.later(key, REGISTRY)
        return {"path": name, **rows, **({"options": options} if options else {})}
    about = mapping(info[name])
    folder = str(c.get("dataset_dir"))
    hub, file = about.get("hf_hub_url"), about.get("file_name")
    entry: Entry = {"path": place(f"{folder}/{file}", c.folder) if file else str(hub)}
    chat = about.get("formatting") == "sharegpt"
    entry["format"] = "chat" if chat else "alpaca"
    for there, ours in (("subset", "name"), ("split", "split"), ("num_samples", "limit")):
        if about.get(there) is not None:
            entry[ours] = about[there]
    columns, tags = about.get("columns", {}), about.get("tags", {})
    known = {"messages": "messages", "system": "system", "tools": "tools"}
    known |= {} if chat else {"prompt": "instruction", "query": "input", "response": "output"}
    fields = {known[there]: str(column) for there, column in columns.items() if there in known}
    if chat:
        fields = (
            SHAREGPT
            | fields
            | {ours: tags[t] for t, ours in (("role_tag", "role"), ("content_tag", "content")) if t in tags}
        )
        roles = {"user_tag": "user", "assistant_tag": "assistant", "system_tag": "system", "observation_tag": "tool"}
        options["roles"] = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
        options["roles"] |= {str(tags[tag]): role for tag, role in roles.items() if tag in tags and tags[tag] != role}
    else:
        options |= {"chat_template": True, "question": "{instruction}\n{input}"}
    if rows:
        return answers.registered(c, key, entry, about)
    others = sorted({*columns} - {*known})
    if others:
        c.later(key, f"columns of dataset_info.json: {', '.join(others)}")
    return {**entry, "fields": fields, "options": options} if fields else {**entry, "options": options}


def _factory_options(c: Conversion, key: str) -> Entry:
    options: Entry = {}
    for name, option, value in (("train_on_prompt", "train_on_inputs", True), ("mask_history", "turns", "last")):
        if c.get(name) is not None and flag(c.get(name)):
            c.mapped(name, f"data.train: options.{option}", "")
            options[option] = value
    if not quiet(c.get("default_system")):
        c.mapped("default_system", "data.train: options.default_system", "")
        options["default_system"] = str(c.get("default_system"))
    if c.has("enable_thinking"):
        c.mapped("enable_thinking", "data.train: options.template_kwargs", "")
        options["template_kwargs"] = {"enable_thinking": flag(c.get("enable_thinking"))}
    return options
