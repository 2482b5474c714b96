from __future__ import annotations

from pegbox.testing import CommandConformance


class TestAblate(CommandConformance):
    command = "ablate"
