"""The table shows every measured pass, with the fastest of each side, and does not hide what was lost."""

from __future__ import annotations

from pathlib import Path

import pytest
from pegbox_kernels.harness import table

HEADER = (
    "op,workload,what,contender,status,median_ms,p20_ms,p80_ms,peak_bytes,percent_of_limit,graph_ms,"
    "gpu,torch,triton,commit,date"
)
WHERE = "G,2.11,3.6,abc,2026-01-01"


def results(folder: Path, *lines: str) -> Path:
    lines = tuple(line + "," * (10 - line.count(",")) for line in lines)
    (folder / "gpu").mkdir()
    (folder / "gpu" / "op.csv").write_text("\n".join([HEADER, *(f"{line},{WHERE}" for line in lines)]) + "\n")
    return folder


def printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    table.main([str(folder)])
    return capsys.readouterr().out


def test_a_lost_pass_is_bold_and_names_the_winner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(
        tmp_path,
        "op,w,forward,pegbox,ok,2.0,,,1048576,50",
        "op,w,forward,pegbox variant,ok,3.0,,,1048576,33",
        "op,w,forward,slow peer,ok,9.0,,,1048576,10",
        "op,w,forward,fast peer,ok,1.0,,,1048576,99",
    )
    line = "| **op** | **w** | **forward** | **2** | **50 %** | **1** | **fast peer** | **1** |  | **0.50** |"
    assert line in printed(folder, capsys)


def test_of_short_operations_the_graphs_decide_where_both_were_captured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(
        tmp_path,
        "op,w,forward,pegbox,ok,2.0,,,1048576,50,0.5",
        "op,w,forward,peer,ok,1.0,,,1048576,10,0.8",
        "op,v,forward,pegbox,ok,2.0,,,1048576,50,0.5",
        "op,v,forward,peer,ok,1.0,,,1048576,10,",
    )
    page = printed(folder, capsys)
    assert "| op | w | forward | 2 | 50 % | 1 | peer | 1 | 0.5 / 0.8 | 1.60 |" in page
    assert "| **1** |  | **0.50** |" in page


def test_what_ran_out_of_memory_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path, "op,w,forward,pegbox,ok,2.0,,,2097152,", "op,w,forward,peer,out of memory,,,,,")
    assert "| op | w | forward | 2 |  | 2 |  |  |  |  |" in printed(folder, capsys)


def test_versions_and_commit_stand_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path, "op,w,forward,pegbox,ok,2.0,,,1,")
    assert "- op: torch 2.11, triton 3.6, commit abc, 2026-01-01" in printed(folder, capsys)
