"""The commands keep the contract of commands."""

from __future__ import annotations

from pegbox.testing import CommandConformance


class TestDoctor(CommandConformance):
    command = "doctor"
