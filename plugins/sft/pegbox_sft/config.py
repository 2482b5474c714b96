"""The section `sft` of a config: maximum likelihood has no settings, and a key in it is an error."""

from __future__ import annotations

from pegbox.section import Section


class SftConfig(Section):
    """Supervised fine-tuning. It has no settings: which tokens are trained is for the data to say."""
