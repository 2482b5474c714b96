"""The errors of the engine: what is wrong (with the value seen), why, and what to type next.

`UserError` is a mistake in what the user wrote (config, data file, command line); the command line ends with
exit code 2 and prints no trace. `RunError` is a run that failed although the input was right (exit code 1).

The core keeps the words of its errors in `errors.toml`, one entry per mistake, and raises them with `fail`; plugins
raise the classes directly.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PegboxError(Exception):
    """Base of every error that Pegbox raises on purpose.

    Args:
        what: what is wrong, with the value seen and where (`file:line` if known).
        why: the reason, one sentence.
        next: what to type or change next.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", next: str = "") -> None:
        self.what, self.why, self.next = what, why, next
        super().__init__("\n".join(part for part in (what, why, next) if part))

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.what, self.why, self.next)


class UserError(PegboxError):
    """The user's input is wrong: config, data, command line, or a file that is missing."""

    exit_code = 2


class ConfigError(UserError):
    """A config does not say what it should."""


class DataError(UserError):
    """A data file is missing, unreadable, or holds a row that cannot be used."""


class PluginError(UserError):
    """A plugin is missing, broken, conflicts with another one, or breaks the contract of a hook."""


class PatchError(PluginError):
    """A patch matches nothing, collides with another one, or was never called."""


class RunError(PegboxError):
    """A run failed although its input was right: non-finite loss, disagreeing ranks, a lost checkpoint."""


KINDS = {"config": ConfigError, "data": DataError, "plugin": PluginError, "patch": PatchError, "run": RunError}


def catalog() -> dict[str, dict[str, str]]:
    """Every entry of `errors.toml` by id."""
    import tomllib
    from importlib.resources import files

    return tomllib.loads(files("pegbox").joinpath("errors.toml").read_text(encoding="utf-8"))


def fail(mistake: str, /, **values: object) -> PegboxError:
    """The error with this id, its words filled in; raise what it returns."""
    entry = catalog()[mistake]
    return KINDS[entry["kind"]](*(entry.get(part, "").format(**values) for part in ("what", "why", "next")))


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names that look most like `name`, best first; a name that contains it counts too."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name.lower(), names, n=count, cutoff=0.6)
    return list(dict.fromkeys([*close, *(other for other in names if name and name.lower() in other.lower())]))[:count]


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """`Did you mean 'a' or 'b'?`; if nothing is near, `otherwise` (if given) followed by all known names."""
    names = sorted(set(known))
    found = " or ".join(f"'{candidate}'" for candidate in nearest(name, names))
    return f"Did you mean {found}?" if found else otherwise and f"{otherwise} {', '.join(names) or 'none'}."
