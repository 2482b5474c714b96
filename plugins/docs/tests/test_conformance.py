"""The commands keep the contract of commands."""

from __future__ import annotations

from pegbox.testing import CommandConformance


class TestDocs(CommandConformance):
    command = "docs"


class TestSchema(CommandConformance):
    command = "schema"
