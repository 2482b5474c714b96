"""What backends need beside torch, and whether it is there.

The plugins `attention` and `gpt-oss-attention` hold this file in the same words, see `backends`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec


@dataclass(frozen=True)
class Package:
    """A module that must be importable, the distribution that brings it, and the oldest version that will do."""

    module: str
    distribution: str
    oldest: str


PACKAGES = {
    "flash-attn-4": Package("flash_attn.cute", "flash-attn-4", "4.0.0b26"),  # the first with gradients of sinks
    "pegbox": Package("pegbox_kernels.attention", "pegbox-kernels", "0.1"),
}


def absent(backend: str) -> str:
    """What is missing that a backend needs, with what to type; empty if nothing is."""
    package = PACKAGES.get(backend)
    if package is None:
        return ""
    from packaging.version import Version

    found, remedy = version(package), f"type: pip install '{package.distribution}>={package.oldest}'"
    if found is None:
        return f"{package.module} is not installed; {remedy}"
    if Version(found) < Version(package.oldest):
        return f"{package.distribution} is {found}, older than {package.oldest}; {remedy}"
    return ""


def version(package: Package) -> str | None:
    """The installed version; the oldest that will do if it is not known; None: it cannot be imported."""
    try:
        if find_spec(package.module) is None:
            return None
        return metadata.version(package.distribution)
    except ModuleNotFoundError as error:
        return package.oldest if isinstance(error, metadata.PackageNotFoundError) else None
