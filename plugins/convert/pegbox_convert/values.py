"""How a value of another program is read. Each function returns ours, or raises ValueError with the reason.

Files of these programs are read by looser rules than ours: `yes` is a boolean there, and numbers may be text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

YES, NO = ("yes", "on", "true"), ("no", "off", "false")
NOTHING = ("none", "null", "")
DTYPES = {
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp16": "float16",
    "float16": "float16",
    "half": "float16",
    "fp32": "float32",
    "float32": "float32",
    "float": "float32",
    "auto": "auto",
}


def plain(value: Any) -> Any:
    """As it stands."""
    return value


def flag(value: Any) -> bool:
    """True or false, as a word too."""
    word = str(value).lower()
    if isinstance(value, bool) or word in YES + NO:
        return word in YES
    if value in (0, 1, None):
        return bool(value)
    raise ValueError(f"{value!r} is neither true nor false")


def number(value: Any) -> float:
    """A number, as text too; whole numbers stay whole."""
    if isinstance(value, bool) or value is None:
        raise ValueError(f"{value!r} is no number")
    if isinstance(value, int | float):
        return value
    try:
        return int(value) if str(value).strip().lstrip("+-").isdigit() else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no number") from None


def whole(value: Any) -> int:
    """A whole number."""
    found = number(value)
    if not math.isfinite(found) or found != int(found):
        raise ValueError(f"{value!r} is no whole number")
    return int(found)


def decimal(value: Any) -> float:
    """A number with a fraction."""
    return float(number(value))


def positive(value: Any) -> float | None:
    """A number greater than zero; nothing, zero and less mean off."""
    return None if value is None or (found := number(value)) <= 0 else found


def positive_whole(value: Any) -> int | None:
    """A whole number greater than zero; nothing, zero and less mean off."""
    return None if value is None or (found := whole(value)) <= 0 else found


def text(value: Any) -> str:
    """Text; numbers as they are written."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{value!r} is no text")


def branch(value: Any) -> str | None:
    """A branch, tag or commit; the main branch is what is taken without one."""
    return None if value in (None, "main") else text(value)


def names(value: Any) -> list[str]:
    """A list of names, or one name, or several in one text with commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"{value!r} is no list of names")


def numbers(value: Any) -> list[int]:
    """A list of whole numbers, or one."""
    return [whole(item) for item in value] if isinstance(value, list) else [whole(value)]


def targets(value: Any) -> str | list[str]:
    """Modules: a list of names, or one text: `all-linear` or a regular expression."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return "all-linear"
    return value if isinstance(value, str) else names(value)


def dtype(value: Any) -> str:
    """A data type by one of its names."""
    found = DTYPES.get(str(value).lower().removeprefix("torch."))
    if found is None:
        raise ValueError(f"{value!r} is no data type that we have")
    return found


def mapping(value: Any) -> dict[str, Any]:
    """A mapping."""
    if isinstance(value, dict):
        return value
    raise ValueError(f"{value!r} is no mapping")


def quiet(value: Any) -> bool:
    """Whether a value switches something off or says nothing: null, false, zero, empty."""
    return value is None or value is False or value == 0 or value in ([], {}) or _is_nothing(value)


def _is_nothing(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in (*NOTHING, *NO)


def arguments(value: Any) -> dict[str, Any]:
    """Options as a mapping, or as text: `a=1, b=2`."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, str) or not all("=" in part for part in value.split(",") if part.strip()):
        raise ValueError(f"{value!r} is no list of name=value")
    pairs = (part.split("=", 1) for part in value.split(",") if part.strip())
    found: dict[str, Any] = {}
    for name, given in pairs:
        try:
            found[name.strip()] = number(given.strip())
        except ValueError:
            found[name.strip()] = flag(given.strip()) if given.strip().lower() in YES + NO else given.strip()
    return found


READERS: dict[str, Callable[[Any], Any]] = {
    function.__name__: function
    for function in (
        *(plain, flag, number, whole, decimal, positive, positive_whole),
        *(text, branch, names, numbers, targets, dtype, mapping),
    )
}
"""What a table can name."""
