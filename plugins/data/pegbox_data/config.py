"""The section `data` of a config: which files make a split, how they are read, and how long a row may be."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import JsonValue, model_validator


class DatasetEntry(Section):
    """One file of rows."""

    path: str = setting(..., "File of rows, relative to the folder of the config.", min_length=1)
    format: str = setting(
        "chat", "How a row becomes text: `chat`, `completion`, or a format that another plugin declares."
    )
    source: str | None = setting(
        None,
        "How the file is read: `jsonl`, `json`, `csv`, `parquet`, or another declared source; "
        "by its suffix if not set.",
    )
    limit: int | None = setting(None, "Use only the first so many rows.", unit="rows", ge=1)
    fields: dict[str, str] = setting(
        {}, "Names of the format's fields in this file, such as `{messages: conversations}`."
    )
    options: dict[str, JsonValue] = setting({}, "Options of the format, such as `{turns: last}`.")


class DataConfig(Section):
    """What the run trains on and is evaluated on."""

    train: tuple[DatasetEntry, ...] = setting(..., "Files to train on, one after the other.", min_length=1)
    eval: tuple[DatasetEntry, ...] = setting((), "Files to evaluate on.")
    eval_fraction: float | None = setting(
        None, "Share of the training rows held out for evaluation.", unit="1", gt=0, lt=1
    )
    eval_rows: int | None = setting(None, "Number of training rows held out for evaluation.", unit="rows", ge=1)
    max_length: int | None = setting(None, "Longest row; no limit if not set.", unit="tokens", ge=2)
    overlong: Literal["drop", "truncate", "error"] = setting(
        "drop",
        "What happens to longer rows: leave them out, cut their end off, or stop. Counts are always printed.",
    )
    columns: tuple[str, ...] = setting((), "Columns of the source rows that stay with the examples, for rewards.")

    @model_validator(mode="after")
    def _one_way_to_evaluate(self) -> DataConfig:
        ways = {"eval": self.eval, "eval_fraction": self.eval_fraction, "eval_rows": self.eval_rows}
        given = [name for name, value in ways.items() if value]
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(given)} are both set. Evaluation rows come either from files of their own "
                f"or from the training rows. Keep one of {', '.join(given)}"
            )
        return self
