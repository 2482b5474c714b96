"""The plugin keeps the contract of scorers, with a judge of the plugin hf."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from pegbox.testing import ScoreConformance, Subject
from tiny_judges import judge, tokenizer_of

KEPT: list[TemporaryDirectory[str]] = []


@cache
def folder() -> Path:
    KEPT.append(TemporaryDirectory())
    made = judge(Path(KEPT[-1].name) / "helpful")
    tokenizer_of("it is five", template=None).save_pretrained(made)
    return made


class TestScores(ScoreConformance):
    plugin = "reward-model"

    def subject(self) -> Subject:
        config = {"models": [{"name": str(folder())}]}
        return Subject(self.plugin, config, ("hf", "trainer"))
