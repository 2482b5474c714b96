"""Figures as people read them."""

from __future__ import annotations


def number(value: float | None) -> str:
    """`12,345`, `1.28 M`, `0.7312`, `2.0e-05`; a dash for nothing."""
    if value is None:
        return "–"
    magnitude = abs(value)
    if value == 0:
        return "0"
    if magnitude >= 1e6:
        return f"{value / 1e6:.4g} M"
    if magnitude < 1e-3:
        return f"{value:.1e}"
    return f"{value:,.0f}" if magnitude >= 1000 or float(value).is_integer() else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit in ("B", "KiB") else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def seconds(value: float | None) -> str:
    """`12.5 s`, `3 min 20 s`, `5 h 12 min`."""
    if value is None:
        return "–"
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
