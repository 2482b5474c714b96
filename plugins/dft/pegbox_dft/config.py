"""The section `dft` of a config: the loss has no settings, and a key in it is an error."""

from __future__ import annotations

from pegbox.section import Section


class DftConfig(Section):
    """Dynamic Fine-Tuning. It has no settings: which tokens are trained is for the data to say."""
