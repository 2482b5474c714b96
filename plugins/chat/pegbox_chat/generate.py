"""`pegbox generate RUN_OR_MODEL INPUT.jsonl OUTPUT.jsonl`: answers to every row of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    model: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run's folder, or what model.name may be.")],
    input_file: Annotated[Path, typer.Argument(metavar="INPUT", help="JSONL with `messages` or `prompt` in each row.")],
    output_file: Annotated[Path, typer.Argument(metavar="OUTPUT", help="JSONL: the same rows, with the answers.")],
    field: Annotated[str, typer.Option(help="Name of the answer in the output.")] = "completion",
    system: Annotated[str | None, typer.Option(help="For conversations without a system message.")] = None,
    drop_answer: Annotated[
        bool, typer.Option("--drop-answer", help="Leave out what the assistant says at the end of a conversation.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Rows generated at once.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from the likeliest tokens of this share.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Sample from so many of the likeliest tokens; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of sampled answers; a row's depends on nothing else.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Answer every row of a JSONL file; the output is in the input's order, and complete or not there."""
    from pegbox_chat.outbox import Outbox

    outbox = Outbox(output_file, overwrite=overwrite, resume=resume)
    from pegbox_chat.answers import answers
    from pegbox_chat.opened import open_model
    from pegbox_chat.outbox import made_from
    from pegbox_chat.prompts import Reading, read_prompts
    from pegbox_chat.sampling import Choice

    choice = Choice(max_tokens, temperature, top_p, top_k, seed)
    opened = open_model(model)
    prompts = read_prompts(input_file, opened, Reading(field, system, drop_answer, max_tokens))
    ready = outbox.begin(made_from(prompts, model, choice))
    for made in answers(opened, [prompt for prompt in prompts if prompt.index not in ready], batch, choice):
        outbox.add(made)
        ready |= {answer.index: answer for answer in made}
        typer.echo(f"{len(ready)} of {len(prompts)} rows", err=True)
    outbox.finish(prompts, ready, field)
