"""Pages as a reader sees them: parsed, or opened in a real browser."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pegbox_report.command import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed (looked for {', '.join(NAMES)})")

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'"


class Read(HTMLParser):
    """What a browser would see: elements with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.inside: list[str] = []
        self.figures = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside.append(str(dict(attrs).get("id")))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.figures += data if self.inside[-1] == "figures" else ""
        else:
            self.text += data


def page_of(folder: Path, **options: Any) -> Read:
    report(folder, **{"output": None, **options})
    return Read((folder / "report.html").read_text(encoding="utf-8"))


def opened(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts ran, and what was written to the console."""
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    arguments += [f"--user-data-dir={profile}", "--window-size=1200,2000", "--dump-dom", page.as_uri()]
    done = subprocess.run([str(BROWSER), *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
