"""The part of a completion that is its answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def text_of(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The text of a completion, which may be a list of messages: what the last one says."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def inside(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>`; None if there is none."""
    found = re.findall(rf"<{re.escape(tag)}>(.*?)</{re.escape(tag)}>", text, re.DOTALL)
    return found[-1] if found else None


def last_number(text: str) -> str | None:
    """The last number of a text, without the commas that group its digits."""
    found = NUMBER.findall(text)
    return found[-1].replace(",", "") if found else None
