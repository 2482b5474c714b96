"""Is the merged folder the model that was trained? Next-token distributions on probe prompts, side by side.

The trained model (adapter on its base, loaded as in training) and the merged one are loaded one after the other. At
every position of every prompt: the divergence KL(trained || merged), and whether both hold the same token for the
likeliest. The divergence of the base alone, without the adapter, says how large a difference is; a merge that forgot
the adapter is near the base, and fails however small that difference is. Of a model that classifies, the numbers that
its head predicts are compared in place of distributions (scores.py).
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pegbox.errors import RunError, UserError

from pegbox_merge.side_files import tokenizer_of
from pegbox_merge.verdict import LIMITS, RECORD, Figures, ScoreFigures, add_figures, coarsest

if TYPE_CHECKING:
    import torch
    from pegbox.types import Model
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pegbox_merge.merging import Merged
    from pegbox_merge.runs import Trained

LONGEST = 256
"""Tokens of a probe prompt; further ones are cut off."""
PROBES = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.\n\ndef fibonacci(n: int) -> int:",
    "Translate to French: The meeting was moved to Thursday afternoon.",
    "Which is larger, 9.11 or 9.9? Think step by step.",
    'Return JSON with the keys "name" and "age" for: Maria turned 34 last week.',
    "Continue the story: The lighthouse keeper had not spoken to anyone for",
    "Résume ce texte : le train de nuit partait toujours à l'heure, même sous la neige.",
    "What is the capital of Australia, and what is it known for?",
)


def read_probes(file: Path | None) -> tuple[str, ...]:
    """Prompts, one a line.

    Raises:
        UserError: the file is missing or empty.
    """
    if file is None:
        return PROBES
    if not file.is_file():
        raise UserError(f"there is no file {file}", "--probes names it.", "Correct the name.")
    found = tuple(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not found:
        raise UserError(f"{file} holds no prompt", "--probes expects one a line.", "Write some prompts into it.")
    return found


def check(trained: Trained, done: Merged, prompts: Sequence[str] = PROBES) -> Figures | ScoreFigures:
    """Compare, and write what was found into `merge.json`.

    Raises:
        RunError: the merged model is not the one that was trained; `merge.json` says `failed`.
    """
    figures, kind = compare(trained, done, prompts)
    problems = figures.problems(kind)
    add_figures(done.folder / RECORD, figures, problems, LIMITS[kind])
    if problems:
        raise RunError(
            f"the merged model in {done.folder} is not the one that was trained",
            "; ".join(problems) + ".",
            "Do not use it. Try --dtype float32; if that fails as well, serve the adapter beside its base.",
        )
    return figures


def compare(trained: Trained, done: Merged, prompts: Sequence[str]) -> tuple[Figures | ScoreFigures, str]:
    """The figures, and whose limits hold for them (see `LIMITS`); both models are loaded, one after the other."""
    import torch

    from pegbox_merge import scores

    classifies = trained.options.classify is not None
    look = scores.values if classifies else _log_probabilities
    with _quiet(), torch.inference_mode():
        rows = _encoded(tokenizer_of(trained.folder, trained.base_files), prompts)
        device = _device()
        model = _trained_model(trained, device)
        expected = [look(model, ids) for ids in rows]
        with _without_adapter(model.module, classifies):
            bare = [look(model, ids) for ids in rows]
        ends = set() if classifies else _ends(model.module, trained.folder)
        computed = str(next(model.module.parameters()).dtype).removeprefix("torch.")
        kind = coarsest(done.dtype, "quantized" if trained.quantized else computed)
        del model
        gc.collect()
        merged = trained.load_merged(done.folder)
        merged.module.to(device).eval()
        found = [look(merged, ids) for ids in rows]
        prompts_equal = rows == _encoded(tokenizer_of(done.folder, done.folder), prompts)
        if classifies:
            padded = scores.padded_alike(trained, done.folder, merged)
            return scores.figures(expected, bare, found, prompts_equal=prompts_equal, padding_equal=padded), kind
        near = LIMITS[kind].near
        figures = Figures(
            kl=_mean([_divergence(a, b) for a, b in zip(expected, found, strict=True)]),
            kl_base=_mean([_divergence(a, b) for a, b in zip(expected, bare, strict=True)]),
            top1=_mean([_same_top(a, b, near) for a, b in zip(expected, found, strict=True)]),
            positions=sum(len(ids) for ids in rows),
            prompts_equal=prompts_equal,
            ends_equal=ends == _ends(merged.module, done.folder),
        )
        return figures, kind


def _trained_model(trained: Trained, device: torch.device) -> Model:
    import peft

    model = trained.load_base(trained.options)
    if not getattr(model.module, "is_quantized", False):
        model.module.to(device)
    wrapped = peft.PeftModel.from_pretrained(cast("Any", model.module), str(trained.folder)).eval()
    return replace(model, module=wrapped)


@contextmanager
def _without_adapter(wrapped: Any, classifies: bool) -> Iterator[None]:
    """The base alone; one that classifies keeps the trained head, without which its numbers would say nothing."""
    if not classifies:
        with wrapped.disable_adapter():
            yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in wrapped.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _log_probabilities(model: Model, ids: list[int]) -> Tensor:
    """Of the next token at every position, in float32 on the host: (tokens, vocabulary)."""
    import torch

    network: Any = model.module
    device = next(network.parameters()).device
    logits_TV = network(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
    return cast("torch.Tensor", logits_TV).float().log_softmax(-1).cpu()


def _divergence(expected_TV: Tensor, found_TV: Tensor) -> Tensor:
    return (expected_TV.exp() * (expected_TV - found_TV)).sum(-1).clamp_min(0)


def _same_top(expected_TV: Tensor, found_TV: Tensor, near: float) -> Tensor:
    """1 where the merged model's likeliest token is the trained model's, or as likely to it within `near` nats."""
    best_T = expected_TV.max(-1).values
    chosen_T = expected_TV.gather(-1, found_TV.argmax(-1, keepdim=True))[:, 0]
    return (best_T - chosen_T <= near).float()


def _mean(parts: list[Tensor]) -> float:
    import torch

    return float(torch.cat(parts).double().mean())


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Each prompt as plain text, and as a user's message where there is a chat template."""
    import jinja2

    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if tokenizer.chat_template is not None:
        for prompt in prompts:
            message = [{"role": "user", "content": prompt}]
            try:
                made: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
            except jinja2.TemplateError:
                continue
            rows.append(list(made["input_ids"]))
    return [list(row[:LONGEST]) for row in rows if len(row)]


def _ends(model: Any, folder: Path) -> set[int]:
    """The tokens that end an answer: those of the folder's generation config, or else the model's."""
    from transformers import GenerationConfig

    has = (folder / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(str(folder)) if has else model.generation_config
    ends = config.eos_token_id if config.eos_token_id is not None else ()
    return set(ends) if isinstance(ends, list | tuple) else {int(ends)}


def _device() -> torch.device:
    import torch

    return torch.accelerator.current_accelerator() or torch.device("cpu")


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
