"""Rebuilds data/train.jsonl and data/eval.jsonl from the package that holds the rows. The result is always the same.

    python prepare.py

downloads `icalfa` 0.3.6 (40 kB) with pip, installs nothing, and writes both files. DATA.md says where the rows come
from and under which licence.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "icalfa==0.3.6"
FOLDER = Path(__file__).parent / "data"
EVAL_SHARE = 8
DESTROYS = re.compile(r"\b(rm|rmdir|unlink|shred|truncate|kill|killall|pkill)\b|-delete")


def requests(wheel: Path) -> list[dict[str, str]]:
    """The requests, each with two commands that do what it asks; none that removes files or ends processes."""
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith("icalfa/assets/datasets/nl2bash_fs_"))
        every = [request for name in names for request in json.loads(archive.read(name))]
    return [r for r in every if not DESTROYS.search(f"{r['gold']} {r['gold2']}")]


def is_held_out(query: str) -> bool:
    """Whether a request is for evaluation: decided by its text alone."""
    return int.from_bytes(hashlib.sha256(query.encode()).digest()[:8], "big") % EVAL_SHARE == 0


def row(query: str, command: str) -> str:
    """One line of JSON: a request, and a command as the answer."""
    messages = [{"role": "user", "content": query}, {"role": "assistant", "content": command}]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def build(wheel: Path) -> dict[str, list[str]]:
    """The lines of both files. Training has both commands of a request, evaluation the first."""
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    for request in requests(wheel):
        query = " ".join(request["query"].split())
        commands = list(dict.fromkeys([request["gold"].strip(), request["gold2"].strip()]))
        if is_held_out(query):
            lines["eval"].append(row(query, commands[0]))
        else:
            lines["train"] += [row(query, command) for command in commands]
    return lines


def main() -> None:
    """Download the package, write both files, and say how many rows each has."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(pip, check=True)
        (wheel,) = Path(folder).glob("icalfa-*.whl")
        for name, lines in build(wheel).items():
            (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"data/{name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
