from __future__ import annotations

from pegbox.testing import CommandConformance


class TestConvert(CommandConformance):
    command = "convert"
