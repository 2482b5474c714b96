"""The output file: complete and in the input's order, or not there at all.

Answers are written to `OUTPUT.unfinished` as batches end, so an interruption loses one batch. Its first line says
what it was made from; going on from another input, model or choice of tokens would mix answers of two kinds in one
file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_chat.answers import Answer

if TYPE_CHECKING:
    from pegbox_chat.prompts import Prompt
    from pegbox_chat.sampling import Choice


class Outbox:
    """Where answers are kept until all are there.

    Args:
        output: the file that is made in the end.
        overwrite: it may exist.
        resume: an unfinished one may exist.

    Raises:
        UserError: one exists that may not.
    """

    def __init__(self, output: Path, *, overwrite: bool, resume: bool) -> None:
        self.output, self.unfinished = output, output.with_name(f"{output.name}.unfinished")
        self.overwrite = overwrite
        self._require_free()
        if not output.parent.is_dir():
            raise UserError(f"there is no folder {output.parent}", "The output is written there.", "Make it first.")
        if self.unfinished.exists() and not resume:
            raise UserError(
                f"{self.unfinished} holds the answers of a generation that did not end",
                "They would be lost.",
                "Go on with it: give --resume. Or remove the file.",
            )

    def _require_free(self) -> None:
        if self.output.exists() and not self.overwrite:
            raise UserError(f"{self.output} exists", "It would be replaced.", "Name another file, or give --overwrite.")

    def begin(self, made_from: str) -> dict[int, Answer]:
        """Answers that are there already, by row.

        Args:
            made_from: identifies what answers depend on.

        Raises:
            UserError: they were made from something else.
        """
        header = json.dumps({"made_from": made_from})
        if not self.unfinished.exists():
            self._append([header])
            return {}
        lines = self.unfinished.read_text(encoding="utf-8").split("\n")
        complete = lines[:-1]  # what follows the last line break was cut off while it was written
        if not complete or complete[0] != header:
            raise UserError(
                f"{self.unfinished} was made from another input, model or choice of tokens",
                "Answers of two kinds would stand in one file.",
                "Repeat the command it was begun with, or remove the file.",
            )
        self.unfinished.write_text("\n".join(complete) + "\n", encoding="utf-8")
        found = [Answer(**json.loads(line)) for line in complete[1:]]
        return {answer.index: answer for answer in found}

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep the answers of a batch."""
        self._append([json.dumps(asdict(answer), ensure_ascii=False) for answer in answers])

    def _append(self, lines: Sequence[str]) -> None:
        with self.unfinished.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())

    def finish(self, prompts: Sequence[Prompt], answers: dict[int, Answer], field: str) -> None:
        """Write the output, in the input's order, and remove what was unfinished."""
        self._require_free()
        made = self.output.with_name(f"{self.output.name}.new")
        with made.open("w", encoding="utf-8") as file:
            for prompt in prompts:
                answer = answers[prompt.index]
                extra = {field: answer.text, f"{field}_tokens": answer.tokens, f"{field}_finish": answer.finish}
                file.write(json.dumps({**prompt.row, **extra}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        made.replace(self.output)
        self.unfinished.unlink()


def made_from(prompts: Sequence[Prompt], model: str, choice: Choice) -> str:
    """Identifies what answers depend on: the prompts' tokens, the model's files, how tokens are chosen."""
    folder = Path(model).expanduser()
    files = sorted(folder.glob("*")) if folder.is_dir() else [folder] if folder.is_file() else []
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    parts = [[prompt.ids for prompt in prompts], model, states, asdict(choice)]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
