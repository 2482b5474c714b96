"""One table of what was measured, from the CSV files of the benchmark: ours beside the fastest peer, lost or won.

    python -m pegbox_kernels.harness.table benchmarks/results > table.md

A line is one pass over one workload on one GPU. The ratio is the peer's time over ours: below 1 the peer is
faster, and such lines are in bold. What was measured as captured graphs too, which leave the host out, is compared by
those. `of limit` is the share of what the GPU's own copy and matrix product allow (see
`bench.py`); files older than that column say nothing there.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

OURS = "pegbox"
Line = Mapping[str, str]
INTRODUCTION = """<!-- Written by `make docs` from kernels/benchmarks/results: measure again, do not edit. -->

# Kernels: what was measured

Each line is one pass over one workload; both sides ran in one process on one GPU, and ours agreed with its reference
there before it was timed. The ratio is the fastest peer's time over ours; where it is below 1 the peer is faster, and
the line is bold. Short operations were measured as captured graphs too, ours and the peer's, which leaves out what
launching them costs the host; for them the ratio is that of the graphs. `of limit` is the share of what the GPU's own
copy and matrix product allow, as measured in the same run. What is not in the table was not measured. How it was
measured: `kernels/pegbox_kernels/harness/bench.py`.
"""
HEAD = (
    "operation",
    "workload",
    "pass",
    "ours, ms",
    "of limit",
    "peak, MiB",
    "fastest peer",
    "its ms",
    "as graphs, ms",
    "ratio",
)


def main(arguments: Sequence[str]) -> None:
    """Print the page of a folder of results, one section for each GPU."""
    print(INTRODUCTION.rstrip())
    for gpu, lines in groupby(read(Path(arguments[0])), key=lambda line: line["gpu"]):
        print(f"\n## {gpu}\n")
        print(*table(list(lines)), sep="\n")


def read(folder: Path) -> list[Line]:
    """Every line of every CSV below a folder, by GPU and operation."""
    lines: list[Line] = []
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            lines += csv.DictReader(file)
    return sorted(lines, key=lambda line: (line["gpu"], line["op"]))


def table(lines: Sequence[Line]) -> Iterator[str]:
    """The lines of one GPU in Markdown, with a note of the versions and commits that they were measured with."""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|" + "---|" * len(HEAD)
    for key, contenders in _by_pass(lines):
        measured = [line for line in contenders if line["median_ms"]]
        ours = [line for line in measured if line["contender"].startswith(OURS)]
        if ours:
            yield _row(key, min(ours, key=_ms), [line for line in measured if not line["contender"].startswith(OURS)])
    yield ""
    versions = sorted({(line["op"], line["torch"], line["triton"], line["commit"], line["date"]) for line in lines})
    for op, torch, triton, commit, date in versions:
        yield f"- {op}: torch {torch}, triton {triton}, commit {commit}, {date}"


def _by_pass(lines: Iterable[Line]) -> Iterator[tuple[tuple[str, str, str], list[Line]]]:
    found: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        found.setdefault((line["op"], line["workload"], line["what"]), []).append(line)
    yield from found.items()


def _row(key: tuple[str, str, str], ours: Line, peers: Sequence[Line]) -> str:
    share = ours.get("percent_of_limit") or ""
    cells = [*key, f"{_ms(ours):.3g}", f"{float(share):.0f} %" if share else "", _mib(ours)]
    if not peers:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    peer = min(peers, key=_ms)
    captured = [float(line.get("graph_ms") or 0) for line in (ours, peer)]
    graphs = " / ".join(f"{one:.3g}" for one in captured) if all(captured) else ""
    ratio = captured[1] / captured[0] if graphs else _ms(peer) / _ms(ours)
    cells += [peer["contender"], f"{_ms(peer):.3g}", graphs, f"{ratio:.2f}"]
    if ratio < 1:
        cells = [f"**{cell}**" if cell else "" for cell in cells]
    return "| " + " | ".join(cells) + " |"


def _ms(line: Line) -> float:
    return float(line["median_ms"])


def _mib(line: Line) -> str:
    return f"{int(line['peak_bytes']) / 2**20:,.0f}" if line["peak_bytes"] else ""


if __name__ == "__main__":
    main(sys.argv[1:])
