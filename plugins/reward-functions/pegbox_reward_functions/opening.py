"""From what the config says to a function: an item of kind `reward` with options, or an import path.

The same in the process that trains, which looks at signatures, and in the workers, which call. A built-in, or what
another plugin declares as an item of kind `reward`, is an object with `options`, a section, and `open(options)`, which
gives a function. Functions are called as TRL calls them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from pegbox.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pegbox.record import Json
    from pegbox.section import Section

RewardFunction = Callable[..., Any]
GIVEN = ("prompts", "completions", "completion_ids")
"""What every function gets, besides the columns of the rows."""


class Reward(Protocol):
    """The target of an item of kind `reward`."""

    options: type[Section]

    def open(self, options: Any) -> RewardFunction:
        """A function of keyword arguments; its attribute `columns` names those of the rows that it requires, unless
        its parameters do."""


@dataclass(frozen=True)
class Named:
    """A reward by name, as plain data that another process can open.

    Attributes:
        name: of the score.
        use: what the config says.
        target: of a declared item: `package.module:attribute`, or the object; None: `use` is an import path.
        options: of the item, as plain data.
        folders: where files and modules of the user are looked for, in order.
    """

    name: str
    use: str
    target: object
    options: Mapping[str, Json]
    folders: tuple[str, ...]

    def open(self) -> RewardFunction:
        """The function.

        Raises:
            ConfigError: it cannot be found or is no function.
        """
        if self.target is None:
            return imported(self.use, self.folders)
        reward = declared(self.target)
        import json

        return reward.open(reward.options.model_validate_json(json.dumps(dict(self.options))))  # type: ignore[no-any-return]


def declared(target: object) -> Any:
    """The target of an item: an object, or the one that `package.module:attribute` names."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def is_path(use: str) -> bool:
    """Whether it can be an import path: built-ins have neither dots nor colons."""
    return ":" in use or "." in use


def imported(use: str, folders: Sequence[str]) -> RewardFunction:
    """The function that `module:function`, `module.function` or `./file.py:function` names."""
    module_name, colon, attribute = use.rpartition(":")
    if not colon:
        module_name, _, attribute = use.rpartition(".")
    module = _of_file(module_name, folders) if module_name.endswith(".py") else _of_name(use, module_name, folders)
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(
                f"reward function '{use}': {module_name} has no '{attribute}'",
                did_you_mean(attribute, names, "It has:"),
                "Correct reward-functions.functions.",
            )
        function = getattr(function, part)
    if not callable(function):
        raise ConfigError(
            f"reward function '{use}' is {type(function).__name__}, not a function",
            "It is called with prompts, completions and columns.",
            "Correct reward-functions.functions.",
        )
    return function  # type: ignore[no-any-return]


def _of_file(written: str, folders: Sequence[str]) -> ModuleType:
    places = [Path(written).expanduser()] if Path(written).is_absolute() else [Path(one, written) for one in folders]
    path = next((place.resolve() for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(
            f"the file {written} of a reward function does not exist",
            f"Looked for it in {', '.join(dict.fromkeys(folders))}.",
            "Correct reward-functions.functions.",
        )
    name = f"pegbox_reward_{path.stem}_{blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name not in sys.modules:
        see(str(path.parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None, "a .py file has a loader"
        assert spec.loader is not None, "a .py file has a loader"
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException as error:
            del sys.modules[name]
            raise _fails(written, error) from error
    return sys.modules[name]


def _of_name(use: str, name: str, folders: Sequence[str]) -> ModuleType:
    for folder in reversed(folders):
        see(folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise _fails(name, error) from error
        raise ConfigError(
            f"reward function '{use}': there is no module '{name}'",
            f"Looked for it in the installed packages and in {', '.join(dict.fromkeys(folders))}.",
            "Correct reward-functions.functions, or name a file: ./file.py:function",
        ) from error
    except Exception as error:
        raise _fails(name, error) from error


def see(folder: str) -> None:
    """Let modules be found in a folder."""
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _fails(what: str, error: BaseException) -> ConfigError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    told = [*traceback.format_list(frames[1:]), *traceback.format_exception_only(error)]
    return ConfigError(
        f"{what}, which holds a reward function, cannot be imported: {told[-1].strip()}",
        f"Its code runs when it is imported:\n{''.join(told[:-1]).rstrip()}",
        "Correct it.",
    )


@dataclass(frozen=True)
class Parameters:
    """What a function takes: names it requires, and all it knows (None: any)."""

    required: frozenset[str]
    known: frozenset[str] | None

    def of(self, given: Iterable[str]) -> tuple[str, ...]:
        """The arguments it takes of those there are; with `**` all that TRL would pass."""
        left_out = {"prompt", "completion"} - self.required
        return tuple(name for name in given if (name not in left_out if self.known is None else name in self.known))


def parameters_of(function: RewardFunction) -> Parameters:
    """Read from the signature, and from an attribute `columns` if it has one."""
    listed = inspect.signature(function).parameters.values()
    by_name = [one for one in listed if one.kind in (one.KEYWORD_ONLY, one.POSITIONAL_OR_KEYWORD)]
    required = {one.name for one in by_name if one.default is one.empty} | set(getattr(function, "columns", ()))
    any_name = any(one.kind is one.VAR_KEYWORD for one in listed)
    return Parameters(frozenset(required), None if any_name else frozenset(one.name for one in by_name))
