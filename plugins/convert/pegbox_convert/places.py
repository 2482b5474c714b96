"""Relative paths: other programs start them at the current folder, our configs at their own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def place(path: str, folder: Path) -> str:
    """The path as a config in `folder` writes it; names of a hub and addresses stay."""
    written = Path(path).expanduser()
    if "://" in path or written.is_absolute() or not written.exists():
        return path
    return Path(os.path.relpath(written.resolve(), folder.resolve())).as_posix()


def first_row(path: str) -> dict[str, Any] | None:
    """The first row of a JSON file or of JSON Lines; None if there is none to be read."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(file.glob("*.json*"))
        file = next((other for other in inside if "train" in other.name), inside[0]) if inside else file
    if not file.is_file() or file.suffix not in (".json", ".jsonl", ".ndjson"):
        return None
    try:
        with file.open(encoding="utf-8") as lines:
            start = next((line for line in lines if line.strip()), "")
        row = json.loads(start) if file.suffix != ".json" or start.strip() not in ("[", "{") else None
        row = json.loads(file.read_text(encoding="utf-8")) if row is None else row
    except (OSError, ValueError):
        return None
    row = row[0] if isinstance(row, list) and row else row
    return row if isinstance(row, dict) else None
