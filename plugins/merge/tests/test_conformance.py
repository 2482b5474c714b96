from __future__ import annotations

from pegbox.testing import CommandConformance


class TestMerge(CommandConformance):
    command = "merge"
