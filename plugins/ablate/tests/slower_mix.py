"""A plugin for tests that changes training: one matrix learns at a part of the rate."""

from __future__ import annotations

from collections.abc import Sequence

from pegbox.hooks import hookimpl
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, GroupOptions


class SlowerMix(Section):
    scale: float = setting(0.1, "Learning rate of the matrix, relative to the others.", unit="1", gt=0)


class Plugin:
    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=SlowerMix)

    @hookimpl
    def configure_groups(self, ctx) -> Sequence[GroupOptions]:
        return [GroupOptions(pattern=r"^mix\.weight$", learning_rate_scale=ctx.section(SlowerMix).scale)]
