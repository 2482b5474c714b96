"""A plugin of one file: asks the model the same questions before and after training, and notes the held-out loss.

It observes the run: `RunStarted` carries the model before its first step, `Evaluated` the held-out loss, and when
`RunEnded` comes the same model has been trained. A config lists it as ./before_and_after.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pegbox.events import Evaluated, RunEnded, RunStarted
from pegbox.hooks import hookimpl

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.events import Event
    from pegbox.types import Model
    from torch.nn import Module

PROMPTS = Path(__file__).with_name("prompts.json")
LONGEST_ANSWER = 48


class Plugin:
    """Answers and losses of one run: `before` and `after` hold one answer for each prompt."""

    def __init__(self) -> None:
        self.prompts: list[str] = json.loads(PROMPTS.read_text(encoding="utf-8"))
        self.before: list[str] = []
        self.after: list[str] = []
        self.losses: dict[int, float] = {}
        self._model: Model | None = None

    @hookimpl
    def on_event(self, ctx: Context, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._model = event.job.model
            self.before = self._ask_all(ctx, "Before training")
        elif isinstance(event, Evaluated):
            self.losses[event.step] = event.metrics["eval_loss"]
        elif isinstance(event, RunEnded) and event.outcome.reason != "interrupted":
            self.after = self._ask_all(ctx, "After training")

    def _ask_all(self, ctx: Context, title: str) -> list[str]:
        print(f"\n{title}")
        answers = []
        for prompt in self.prompts:
            print(f"  {prompt}", flush=True)
            answers.append(self._ask(ctx, prompt))
            print("".join(f"    | {line}\n" for line in answers[-1].splitlines() or [""]), flush=True)
        return answers

    def _ask(self, ctx: Context, prompt: str) -> str:
        """The most likely answer, token by token."""
        import torch

        assert self._model is not None, "RunStarted comes first"
        tokenizer, module = ctx.processor.tokenizer, self._model.module
        messages = [{"role": "user", "content": prompt}]
        asked = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with _evaluating(module), torch.no_grad():
            told = module.generate(
                **asked.to(ctx.runtime.device),
                max_new_tokens=LONGEST_ANSWER,
                do_sample=False,
                pad_token_id=ctx.processor.pad_id,
            )
        new = told[0, asked["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        return text if len(new) < LONGEST_ANSWER else f"{text} ..."


@contextmanager
def _evaluating(module: Module) -> Iterator[None]:
    trained = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in trained:
            part.training = True
