"""`pegbox chat RUN_OR_MODEL`: what the command line says, and nothing heavy before it is understood."""

from __future__ import annotations

from typing import Annotated

import typer


def chat(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or what model.name may be.")],
    message: Annotated[str | None, typer.Option("--message", "-m", help="Ask this, print the answer, and end.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens of this share.")
    ] = 0.9,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampled answers repeatable.")] = None,
) -> None:
    """Talk to a run or to any model; answers appear as they are written."""
    from pegbox_chat.dialogue import Dialogue, talk
    from pegbox_chat.speaker import Sampling, open_speaker

    speaker = open_speaker(model, Sampling(max_tokens, temperature, top_p), seed)
    dialogue = Dialogue(speaker, system)
    if message is None:
        talk(dialogue, model)
    else:
        dialogue.ask(message)
