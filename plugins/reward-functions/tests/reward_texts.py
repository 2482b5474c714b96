"""Rollouts given as texts, and the scores that a config gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pegbox import hooks
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.rollouts import Rollout, RolloutBatch
from pegbox.testing.tiny import EOS, tiny_processor


def rollouts(*groups: tuple[Mapping[str, Any], Sequence[str]]) -> RolloutBatch:
    """One group for each (columns, completions); the prompt's tokens are the text of the column `prompt`."""
    made = []
    for columns, texts in groups:
        prompt = columns.get("prompt", "ask")
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        for completion in texts:
            ids = (*completion.encode(), EOS)
            made.append(
                Rollout(
                    prompt=tuple(text.encode()),
                    completion=ids,
                    logps=(-1.0,) * len(ids),
                    first_version=0,
                    last_version=0,
                    finished=True,
                    columns=columns,
                )
            )
    return RolloutBatch(rollouts=tuple(made), samples=len(groups[0][1]))


def context(folder: Path, *functions: Any, **settings: Any) -> Context:
    """A run of this plugin alone; its config lies in `folder`."""
    section = {"functions": list(functions), **settings}
    path = folder / "run.yaml"
    import json

    config = {"model": {"name": "x"}, "plugins": ["reward-functions"], "reward-functions": section}
    path.write_text(json.dumps({**config, "output": str(folder / "run")}), encoding="utf-8")
    ctx = compose(path)
    ctx.processor = tiny_processor()
    return ctx


def scored(ctx: Context, batch: RolloutBatch) -> dict[str, tuple[float | None, ...]]:
    """Values by name."""
    with ctx.exit:
        ((_, scores),) = ctx.each(hooks.score_rollouts, ctx, batch)
    return {score.name: score.values_R for score in scores}
