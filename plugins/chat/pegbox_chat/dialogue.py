"""A conversation in the terminal: what was said so far, and the few commands of its prompt.

Answers go to standard output, everything else to standard error, so that `pegbox chat ... --message ... > file` holds
the answer alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer
from pegbox.errors import UserError

if TYPE_CHECKING:
    from pegbox_chat.speaker import Message, Speaker

COMMANDS = {
    "/exit": "end",
    "/reset": "forget what was said",
    "/system TEXT": "tell the model TEXT before the conversation, and begin anew",
}


@dataclass
class Dialogue:
    """What was said so far, and who answers."""

    speaker: Speaker
    system: str | None = None
    said: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> str:
        """Add a message, print the answer as it is written, remember both.

        Raises:
            UserError: the conversation does not fit the model; it is as it was before.
        """
        asked: Message = {"role": "user", "content": text}
        before: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        answer = self.speaker.answer([*before, *self.said, asked], _print)
        _print("\n")
        self.said += [asked, {"role": "assistant", "content": answer}]
        return answer

    def obey(self, line: str) -> bool:
        """Carry out a line that begins with a slash; False ends the conversation."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/reset":
            self.said.clear()
            note("Forgotten.")
        elif name == "/system":
            self.said.clear()
            self.system = rest.strip() or None
            note("The model will be told this first." if self.system else "The model will be told nothing first.")
        else:
            note("\n".join(f"{known:<13} {meaning}" for known, meaning in COMMANDS.items()))
        return True


def talk(dialogue: Dialogue, name: str) -> None:
    """Ask what is typed until the end of the input or `/exit`; Ctrl-C stops an answer."""
    note(f"{name}. Type a message; {', '.join(COMMANDS)}.")
    while True:
        try:
            line = _read().strip()
        except (EOFError, KeyboardInterrupt):
            note("")
            return
        if line.startswith("/"):
            if not dialogue.obey(line):
                return
        elif line:
            _answer(dialogue, line)


def _answer(dialogue: Dialogue, line: str) -> None:
    try:
        dialogue.ask(line)
    except UserError as error:
        note(str(error))


def _read() -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line
    import readline  # noqa: F401  input() then edits lines and remembers them

    return input("> ")


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Say something that is not the model's."""
    typer.echo(text, err=True)
