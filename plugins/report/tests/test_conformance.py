from __future__ import annotations

from pegbox.testing import CommandConformance


class TestReport(CommandConformance):
    command = "report"
