from __future__ import annotations

from pegbox.testing import CommandConformance


class TestChat(CommandConformance):
    command = "chat"


class TestGenerate(CommandConformance):
    command = "generate"
