"""`pegbox merge RUN`: what the command line says, and nothing heavy before it is understood."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import typer

Float = Literal["stored", "float32", "bfloat16", "float16"]


def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or the folder of a PEFT adapter.")],
    output: Annotated[Path | None, typer.Option(help="New folder for the model; RUN/merged unless given.")] = None,
    dtype: Annotated[Float, typer.Option(help="Data type of the weights; stored: the base's own.")] = "stored",
    base: Annotated[str | None, typer.Option(help="Where the base model is now, if it was moved.")] = None,
    onto: Annotated[
        Literal["trained", "published"],
        typer.Option(help="Of a base that was quantized for training: the weights as trained on, or as published."),
    ] = "trained",
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights, such as 5GB.")] = "5GB",
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not compare the result with the run.")] = False,
    probes: Annotated[
        Path | None, typer.Option(help="Prompts for the check, one a line; built-in ones unless given.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base model, and check that it still is the model that was trained."""
    _hush_neighbours()
    from pegbox_merge.fidelity import check, read_probes
    from pegbox_merge.merging import MergeRequest, write_merged
    from pegbox_merge.runs import open_run

    prompts = read_probes(probes)
    trained = open_run(run, base, onto)
    request = MergeRequest(output or trained.folder / "merged", dtype, max_shard_size)
    done = write_merged(trained, request)
    typer.echo(f"merged {done.changed} of {done.tensors} tensors onto {trained.onto}: {done.folder}")
    if no_check:
        typer.echo("not checked (--no-check); merge.json says so")
        return
    typer.echo(str(check(trained, done, prompts)))


def _hush_neighbours() -> None:
    """PEFT imports these libraries wherever they are installed, and they tell of kernels that a merge does not use."""
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
