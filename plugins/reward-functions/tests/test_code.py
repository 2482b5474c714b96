"""Programs are judged by tests, and cannot do what they should not."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import RunError
from pegbox_reward_functions.builtin.code import Code, CodeOptions, program_of
from pegbox_reward_functions.cell import Limits, Verdict, run_program
from reward_texts import context, rollouts, scored

RIGHT = "Here:\n```python\ndef add(a, b):\n    return a + b\n```"
WRONG = "```python\ndef add(a, b):\n    return a - b\n```"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="what shuts programs in is Linux's")


def judged(said: str, tests: Any, **options: Any) -> float | None:
    value: float | None = Code().open(CodeOptions(**options))([said], tests=[tests])[0]
    return value


def ran(program: str, **limits: Any) -> Verdict:
    return run_program(program, "", Limits(**limits))


@pytest.mark.parametrize(
    ("said", "tests", "value"),
    [
        (RIGHT, "assert add(1, 2) == 3", 1.0),
        (WRONG, "assert add(1, 2) == 3", 0.0),
        (WRONG, ["assert add(1, 0) == 1", "assert add(1, 2) == 3"], 0.5),
        ("no code at all", "assert add(1, 2) == 3", 0.0),
        (RIGHT, None, None),
        (RIGHT, [], None),
        ("```\nprint(int(input()) * 2)\n```", [{"input": "4\n", "output": "8"}, {"input": "5", "output": "10"}], 1.0),
        ("print(int(input()) * 2)", '[{"input": "4", "output": "9"}]', 0.0),
        ("print(input()); import sys; sys.exit(0)", {"inputs": ["a"], "outputs": ["a\n"]}, 1.0),
    ],
)
def test_programs_are_judged_by_their_tests(said: str, tests: Any, value: float | None) -> None:
    assert judged(said, tests) == value


def test_all_tests_or_nothing() -> None:
    assert judged(WRONG, ["assert add(1, 0) == 1", "assert add(1, 2) == 3"], all_or_nothing=True) == 0.0


def test_the_last_block_of_code_is_the_program() -> None:
    assert program_of("```python\na\n```\nbetter:\n```py\nb\n```") == "b\n"
    assert program_of("x = 1") == "x = 1"


@pytest.mark.parametrize(
    "program",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "quit()", "import os; os.abort()"],
)
def test_leaving_before_the_tests_is_no_success(program: str) -> None:
    assert judged(f"{program}", "assert False") == 0.0


def test_a_test_that_is_no_test_is_told() -> None:
    with pytest.raises(RunError, match="a test is 5"):
        judged(RIGHT, [5])


def test_the_reward_is_computed_by_a_worker(tmp_path: Path) -> None:
    batch = rollouts(({"prompt": "add", "tests": "assert add(1, 2) == 3"}, [RIGHT, WRONG]))
    assert scored(context(tmp_path, "code"), batch) == {"code": (1.0, 0.0)}


def test_a_program_without_end_is_stopped_and_gone() -> None:
    """By the clock or by the processor's time, whichever limit is reached; it does not outlive its judge."""
    say = "import os\nprint(os.getpid(), flush=True)\n"
    for wall_s in (0.5, 4.0, 32.0):  # a busy machine may take long to start it
        slept = ran(f"{say}import time\nwhile True: time.sleep(60)", wall_s=wall_s)  # no time of the processor
        if slept.printed:
            break
    before = os.times()
    counted = ran(f"{say}while True: pass", wall_s=120.0, cpu_s=1)
    after = os.times()
    for verdict in (slept, counted):
        assert not verdict.ended_or_left
        with pytest.raises(ProcessLookupError):
            os.kill(int(verdict.printed), 0)
    # Long before its 120 s: what it took of the processor, because other programs slow the clock down.
    assert after.children_user - before.children_user < 10


def test_memory_files_and_output_are_limited(tmp_path: Path) -> None:
    assert "MemoryError" in ran("x = bytearray(1 << 30)").complaint
    assert "File too large" in ran("open('big', 'wb').write(bytes(8 << 20))").complaint
    verdict = ran("while True: print('x' * 1000)", file_bytes=1 << 20)
    assert not verdict.ended
    assert len(verdict.printed) == 1 << 20
    assert "Too many open files" in ran("a = [open('f', 'w') for _ in range(100)]").complaint
    assert "not allowed" in ran("import resource; resource.setrlimit(resource.RLIMIT_CPU, (99, 99))").complaint


def test_a_program_sees_an_empty_environment_and_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    verdict = ran("import os; print(sorted(os.environ), os.getcwd(), os.listdir(), sep='\\n')")
    names, folder, files = verdict.printed.splitlines()
    assert set(eval_list(names)) <= {"HOME", "TMPDIR", "LC_CTYPE"}
    assert "pegbox-code-" in folder
    assert not Path(folder).exists()
    assert files == "['program.py']"


def eval_list(text: str) -> list[str]:
    return [part.strip(" '") for part in text.strip("[]").split(",")]


@LINUX
def test_a_program_starts_no_process() -> None:
    assert "processes" in ran("pass").held
    bomb = ran("import os\nwhile True: os.fork()", wall_s=3.0)
    assert "PermissionError" in bomb.complaint
    for attempt in (
        "import subprocess; subprocess.run(['true'])",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import multiprocessing as m\nm.Process(target=print).start()",
        "import os, signal; os.kill(os.getppid(), signal.SIGTERM)",
        "import ctypes; assert ctypes.CDLL(None).fork() >= 0",
    ):
        assert not ran(attempt).ended, attempt
    assert ran("import threading as t\na = t.Thread(target=print); a.start(); a.join()").ended


@LINUX
def test_a_program_reaches_no_network() -> None:
    assert "network" in ran("pass").held
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert "PermissionError" in ran(reach).complaint
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert "PermissionError" in ran("import socket; socket.socket(socket.AF_UNIX)").complaint
    assert ran("import asyncio\nasyncio.run(asyncio.sleep(0))").ended


@LINUX
def test_a_program_writes_into_its_own_folder_alone(tmp_path: Path) -> None:
    assert "files" in ran("pass").held
    target = tmp_path / "weights"
    target.write_text("kept", encoding="utf-8")
    path = repr(str(target))
    for attempt in (
        f"open({path}, 'w')",
        f"import os; os.remove({path})",
        f"import os; os.truncate({path}, 0)",
        f"import os; os.chmod({path}, 0)",
        f"import os; os.rename('program.py', {path})",
        "open('/dev/shm/x', 'w')",
    ):
        assert "PermissionError" in ran(attempt).complaint, attempt
    assert target.read_text(encoding="utf-8") == "kept"
    assert ran("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'a')\nopen('out', 'w').write('b')").ended
