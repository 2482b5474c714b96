"""What the command of a plugin promises: help at once, and words for every parameter."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable

from pegbox.testing.probe import HEAVY
from pegbox.testing.rule import require
from pegbox.testing.running import run_cli
from pegbox.testing.subject import Subject

LOOK = """
import json, sys
path, module, *heavy = json.load(sys.stdin)
sys.path[:] = path
__import__(module)
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def is_imported_without_heavy_libraries(subject: Subject) -> None:
    """Importing the command's module loads neither torch nor its like: help imports it."""
    import json

    module = subject.installed.value.partition(":")[0]
    request = json.dumps([sys.path, module, *HEAVY])
    done = subprocess.run([sys.executable, "-c", LOOK], input=request, capture_output=True, text=True, check=False)
    require(
        done.returncode == 0,
        f"importing {module} fails:\n{done.stderr.strip()[-2000:]}",
        "The command cannot be called.",
        "Repair the import.",
    )
    heavy = json.loads(done.stdout.splitlines()[-1])
    require(
        not heavy,
        f"importing {module} imports {', '.join(heavy)}",
        f"`pegbox {subject.plugin} --help` and a wrong option answer at once.",
        "Move the import into the function.",
    )


def shows_its_help(subject: Subject) -> None:
    """`pegbox NAME --help` works and begins with what the command does."""
    done = run_cli(subject.plugin, "--help")
    target = _function(subject)
    said = (inspect.getdoc(target) or "").strip()
    require(
        done.returncode == 0,
        f"`pegbox {subject.plugin} --help` ends with code {done.returncode}: {(done.stderr or done.stdout)[-800:]}",
        "Help is how a command is learnt.",
        "Annotate every parameter with a type that typer knows.",
    )
    require(
        bool(said),
        f"the command '{subject.plugin}' has no docstring",
        "Its first line is the help.",
        "Write one sentence that says what the command does.",
    )


def documents_every_parameter(subject: Subject) -> None:
    """Every parameter has a help text."""
    target = _function(subject)
    hints = inspect.signature(target, eval_str=True).parameters
    silent = [
        name
        for name, parameter in hints.items()
        if not any(getattr(extra, "help", None) for extra in getattr(parameter.annotation, "__metadata__", ()))
        and not getattr(parameter.default, "help", None)
        and "Context" not in str(parameter.annotation)
    ]
    require(
        not silent,
        f"the command '{subject.plugin}' does not explain: {', '.join(silent)}",
        "Its help would name them and say nothing.",
        'Write: name: Annotated[str, typer.Option(help="One sentence.")]',
    )


def _function(subject: Subject) -> Callable[..., object]:
    from importlib import import_module

    module, _, attribute = subject.installed.value.partition(":")
    return getattr(import_module(module), attribute)  # type: ignore[no-any-return]
