"""The section `mxfp4` of a config."""

from __future__ import annotations

from pegbox.section import Section, setting


class Mxfp4Config(Section):
    """Where the packed weights come from."""

    quantize: bool = setting(
        False,
        "Pack experts that are stored in floating point while they are loaded; off, the checkpoint must hold them in "
        "MXFP4, as those of gpt-oss do.",
    )
