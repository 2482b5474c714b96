"""The rules that every plugin keeps."""

from __future__ import annotations

from pegbox.testing import PluginConformance


class TestData(PluginConformance):
    plugin = "data"
    config = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.1, "max_length": 512}  # noqa: RUF012
