"""The reward `code`: the share of the row's tests that the completion's program passes, each in a limited process.

The program is the last block of code in the completion (```python ... ```), or all of it where there is none. Tests are

- a text or a list of texts: Python that is run behind the program, and passes if it ends without an exception;
- a list of `{input, output}`: the program reads the one and must print the other; blanks at line ends do not count.

What the process may do is in `jail`; what that does not stop stands in the README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pegbox.errors import ConfigError, RunError
from pegbox.section import Section, setting

from pegbox_reward_functions.builtin.said import text_of
from pegbox_reward_functions.cell import Limits, Verdict, run_program

BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


class CodeOptions(Section):
    """Options of the reward `code`."""

    tests: str = setting(
        "tests", "Column with the tests: text, list of texts, or list of {input, output}.", min_length=1
    )
    all_or_nothing: bool = setting(False, "1 if every test passes, else 0, instead of the share that passes.")
    test_s: float = setting(4.0, "Longest run of one test, on the clock.", unit="seconds", gt=0)
    cpu_s: int = setting(4, "Longest run of one test, in time of the processor.", unit="seconds", ge=1)
    memory_mib: int = setting(512, "Largest address space of a program.", unit="MiB", ge=64)
    file_mib: int = setting(4, "Largest file it may write, what it prints included.", unit="MiB", ge=1)
    open_files: int = setting(64, "Files it may have open at once.", ge=8)
    require_isolation: bool = setting(
        True, "Refuse to run where the system cannot keep programs from files, network and processes of others."
    )

    def limits(self) -> Limits:
        """What the process may use."""
        return Limits(self.test_s, self.cpu_s, self.memory_mib << 20, self.file_mib << 20, self.open_files)


class Code:
    """Runs programs."""

    options = CodeOptions

    def open(self, options: CodeOptions) -> Callable[..., list[float | None]]:
        missing = {"files", "network", "processes"} - run_program("pass", "", options.limits()).held
        if missing and options.require_isolation:
            raise ConfigError(
                f"the reward 'code' cannot keep programs from the {', '.join(sorted(missing))} of others",
                "This system has no landlock (Linux 5.13) or no seccomp (x86-64, ARM).",
                "Run where it has, or set the option require_isolation: false if you trust the programs.",
            )

        def score(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
            texts, tests = map(text_of, completions), columns[options.tests]
            return [reward(options, program_of(text), wanted) for text, wanted in zip(texts, tests, strict=True)]

        score.columns = (options.tests,)  # type: ignore[attr-defined]
        return score


def program_of(text: str) -> str:
    """The last block of code, or the whole text."""
    blocks = BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


def reward(options: CodeOptions, program: str, tests: Any) -> float | None:
    """The share of tests that pass; None where the row has none."""
    wanted = _listed(tests)
    if not wanted:
        return None
    passed = 0
    for test in wanted:
        if _passes(program, test, options.limits()):
            passed += 1
        elif options.all_or_nothing:
            return 0.0
    return passed / len(wanted)


def _listed(tests: Any) -> Sequence[Any]:
    if isinstance(tests, str) and tests.lstrip().startswith(("[{", '["', "{")):
        try:
            tests = json.loads(tests)
        except ValueError:
            return [tests]
    if isinstance(tests, Mapping) and {"inputs", "outputs"} <= tests.keys():
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        return [{"input": given, "output": wanted} for given, wanted in pairs]
    if isinstance(tests, str | Mapping):
        return [tests]
    return list(tests or ())


def _passes(program: str, test: Any, limits: Limits) -> bool:
    if isinstance(test, str):
        return run_program(f"{program}\n\n{test}\n", "", limits).ended
    if not isinstance(test, Mapping) or not {"input", "output"} <= test.keys():
        raise RunError(
            f"a test is {test!r:.100}",
            "A test is Python text, or a mapping of input and output.",
            "Correct the column that the option tests names.",
        )
    verdict: Verdict = run_program(program, str(test["input"]), limits)
    return verdict.ended_or_left and _lines(verdict.printed) == _lines(str(test["output"]))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


code = Code()
