"""The page in a real browser: the curves are drawn, controls work, nothing is logged to the console."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest
from example_run import metrics, write_run
from page_reader import needs_browser, opened
from pegbox_report.command import report

USE = """<script>{
const told = {};
const image = document.querySelector("#charts svg"), box = image.getBoundingClientRect();
told.paths = [...document.querySelectorAll("#charts svg path")].every((p) => p.getAttribute("d").startsWith("M"));
told.charts = document.querySelectorAll("#charts svg").length;
image.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 40 }));
told.tips = [...document.querySelectorAll(".tip")].map((tip) => tip.hidden ? "" : tip.innerText);
image.dispatchEvent(new PointerEvent("pointerleave"));
told.left = [...document.querySelectorAll(".tip")].every((tip) => tip.hidden);
const line = () => document.querySelector("#charts svg path.line").getAttribute("d");
const before = line();
smooth.value = 0; smooth.dispatchEvent(new Event("input"));
told.smoothing = line() !== before;
const plain = line();
document.getElementById("log").click(); told.log = line() !== plain; document.getElementById("log").click();
document.getElementById("time").click(); document.getElementById("time").click(); told.back = line() === plain;
const visible = () => [...document.querySelectorAll("#keys tbody tr")].filter((row) => !row.hidden).length;
told.all = visible();
document.getElementById("chosen").click(); told.chosen = visible();
document.getElementById("filter").value = "LORA.R";
document.getElementById("filter").dispatchEvent(new Event("input")); told.found = visible();
const paper = () => getComputedStyle(document.body).backgroundColor;
const light = paper(); document.getElementById("theme").click(); told.theme = paper() !== light;
const made = document.createElement("pre"); made.id = "told"; made.textContent = JSON.stringify(told);
document.body.append(made);
}</script>"""


@pytest.mark.slow
@needs_browser
def test_curves_are_drawn_and_every_control_works(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    report(folder, output=None)
    page = tmp_path / "used.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", USE + "</body>"))
    document, console = opened(page, tmp_path / "profile")
    assert console == []
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', document, re.DOTALL)[1]))
    tips = told.pop("tips")
    assert told == {
        "paths": True,
        "charts": 5,
        "left": True,
        "smoothing": True,
        "log": True,
        "back": True,
        "theme": True,
        "all": 14,
        "chosen": 9,
        "found": 1,
    }
    assert len(tips) == 5
    assert all("step" in tip for tip in tips)
    step = int(re.search(r"step (\d+)", tips[0])[1])
    loss = next(row["loss"] for row in metrics() if row["step"] == step and row["kind"] == "train")
    assert f"{loss:.4g}" in tips[0]


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "rows", [[], [{"kind": "train", "step": 1, "loss": 1.0}], [{"kind": "eval", "step": 0, "eval_loss": 1}]]
)
def test_a_page_with_hardly_any_figures_logs_no_error(rows: list, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows)
    report(folder, output=None)
    document, console = opened(folder / "report.html", tmp_path / "profile")
    assert console == []
    assert f'data-drawn="{len(rows)}"' in document
