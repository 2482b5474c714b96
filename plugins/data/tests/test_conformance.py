"""The rules that every plugin and command keeps."""

from __future__ import annotations

import inspect

import pytest
from pegbox.testing import PluginConformance
from pegbox_data.command import app


class TestData(PluginConformance):
    plugin = "data"
    config = {"train": [{"path": "rows.jsonl"}], "eval_fraction": 0.1, "max_length": 512}  # noqa: RUF012


@pytest.mark.parametrize("command", app.registered_commands, ids=lambda command: command.callback.__name__)
def test_the_commands_document_every_parameter(command):
    parameters = inspect.signature(command.callback, eval_str=True).parameters
    assert all(parameter.annotation.__metadata__[0].help for parameter in parameters.values())
    assert command.callback.__doc__
