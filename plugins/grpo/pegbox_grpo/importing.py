"""A function by its import path, `module:function` or `file.py:function`, installed or in the user's folders."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from pegbox.context import Context

HOW = "Write module:function, or file.py:function."


def user_function(ctx: Context, path: str) -> Callable[..., Any]:
    """The function that `grpo.rollout_func` names, looked for in the current folder and beside the config, too."""
    return import_function(path, (Path.cwd(), ctx.config.folder), "grpo.rollout_func")


def import_function(path: str, folders: Sequence[Path], key: str) -> Callable[..., Any]:
    """The function at `module:function` or `file.py:function`; modules and files in `folders` are found, too.

    Args:
        key: of the config, for messages.

    Raises:
        ConfigError: there is no such module, it has no such function, or importing it fails.
    """
    source, _, name = path.rpartition(":")
    try:
        module = _file(source, folders) if source.endswith(".py") else _module(source, folders)
    except Exception as error:
        looked = ", ".join(map(str, folders))
        root = source.split(".")[0]
        missing = isinstance(error, FileNotFoundError) or getattr(error, "name", None) in (source, root)
        why = f"Looked in what is installed, and in {looked}." if missing else f"{type(error).__name__}: {error}"
        what = f"there is no module '{source}'" if missing else f"the module '{source}' cannot be imported"
        raise ConfigError(
            f"{key} is '{path}', but {what}", why, "Write module:function, or file.py:function."
        ) from error
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        functions = [one for one in vars(module) if callable(getattr(module, one)) and not one.startswith("_")]
        raise ConfigError(
            f"{key} is '{path}', but the module '{source}' ({module.__file__}) has no function '{name}'",
            did_you_mean(name, functions, "It has:"),
            HOW,
        )
    return found  # type: ignore[no-any-return]


def _module(name: str, folders: Sequence[Path]) -> ModuleType:
    with _importable(folders):
        return importlib.import_module(name)


def _file(written: str, folders: Sequence[Path]) -> ModuleType:
    """A module from a file, under a name that no installed module has."""
    path = next((found for folder in folders if (found := folder / written).is_file()), None)
    if path is None:
        raise FileNotFoundError(written)
    spec = importlib.util.spec_from_file_location(f"grpo_rollout_func_{path.stem}", path)
    assert spec is not None, "it is a Python file"
    assert spec.loader is not None, "it is a Python file"
    module = importlib.util.module_from_spec(spec)
    with _importable([path.parent, *folders]):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _importable(folders: Sequence[Path]) -> Iterator[None]:
    """Within it the folders are searched first; afterwards the path is as it was."""
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)
