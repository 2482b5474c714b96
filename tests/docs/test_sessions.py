"""The comparison of sessions: what matches, and what must not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

SEEN = "first line\n  second   line 12.5 s\nthird\n"


@pytest.mark.parametrize(
    "wanted",
    [
        "",
        "first line\nsecond line 12.5 s\nthird\n",
        "...\nthird\n",
        "first line\n...\n",
        "first line\n...\nthird\n...\n",
        "first line\nsecond line ... s\nthird\n",
        "...\nsecond ...\n...\n",
    ],
)
def test_what_was_printed_is_recognised(prints: Callable[[str, str], bool], wanted: str) -> None:
    assert prints(wanted, SEEN)


@pytest.mark.parametrize(
    "wanted",
    [
        "first line\n",
        "first line\nthird\n",
        "second ...\n",
        "first line\nsecond line ... m\nthird\n",
        "...\nfourth\n",
        "...\nthird\n...\nfirst line\n...\n",
    ],
)
def test_what_was_not_printed_is_refused(prints: Callable[[str, str], bool], wanted: str) -> None:
    assert not prints(wanted, SEEN)


def test_a_page_whose_command_fails_fails(run_page: Callable[[Path, Path], None], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```sh file=a/hello.sh\necho hello\n```\n\n```console\n$ bash a/hello.sh\nhello\n$ exit 3\n```\n")
    with pytest.raises(AssertionError, match=r"page.md:5: \$ exit 3\s+ends with 3"):
        run_page(page, tmp_path)
    page.write_text(page.read_text().replace("$ exit 3", "$ exit 0").replace("\nhello\n", "\ngood bye\n"))
    with pytest.raises(AssertionError, match="good bye"):
        run_page(page, tmp_path)
