"""The decoding loop: what transformers' generate calls in place of its own.

generate prepares a model's inputs and cache, as it does for all its ways of decoding (`custom_generate`). Three things
make the loop faster than the one of transformers, and leave every token what it is:

- a prompt runs through the model once, and its keys and values are then doubled for the samples of its group;
- rows that have ended leave the batch, so that nothing is computed for them;
- of each step only the chosen token and its log-probability are kept.

    P  prompts    R  completions    S  most new tokens    T  tokens so far, with padding    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pegbox_rollout_hf.endings import StopTexts
    from pegbox_rollout_hf.sampling import Chooser


@dataclass
class Task:
    """What is to be sampled for one batch of prompts, and what was.

    Attributes:
        prompt_R: the row of the prompt of each completion.
        uniform_RS: see `sampling.uniforms`.
        token_RS, logp_RS: the completions, on the device; what stands behind their `length_R` tokens means nothing.
        finished_R: it ended by itself.
    """

    chooser: Chooser
    ending: tuple[int, ...]
    texts: StopTexts
    prompt_R: Tensor
    uniform_RS: Tensor

    def __post_init__(self) -> None:
        device, shape = self.prompt_R.device, self.uniform_RS.shape
        self.token_RS = torch.zeros(shape, dtype=torch.long, device=device)
        self.logp_RS = torch.zeros(shape, device=device)
        self.length_R = [shape[1]] * shape[0]
        self.finished_R = [False] * shape[0]


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    task: Task,
    **model_kwargs: Any,
) -> None:
    """Fill in a task. The arguments are those that generate passes; what it says of sampling is not looked at."""
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
    logits_PV = outputs.logits[:, -1].float()
    ids_RT, logits_RV = input_ids[task.prompt_R], logits_PV[task.prompt_R]
    model_kwargs = _chosen(model_kwargs, task.prompt_R)
    del outputs, logits_PV

    ending = torch.tensor(task.ending, dtype=torch.long, device=input_ids.device)
    rows, steps = torch.arange(len(task.length_R), device=input_ids.device), task.uniform_RS.shape[1]
    for step in range(steps):
        token_R, logp_R = task.chooser(ids_RT, logits_RV, task.uniform_RS[rows, step])
        task.token_RS[rows, step], task.logp_RS[rows, step] = token_R, logp_R
        ended = torch.isin(token_R, ending).tolist()
        if task.texts:
            _look_for_texts(task, rows, step, ended)
        for row, over in zip(rows.tolist(), ended, strict=True) if any(ended) else ():
            if over:
                task.length_R[row], task.finished_R[row] = step + 1, True
        if all(ended) or step + 1 == steps:
            return
        ids_RT = torch.cat([ids_RT, token_R[:, None]], dim=1)
        if any(ended):
            kept = torch.tensor([at for at, over in enumerate(ended) if not over], device=rows.device)
            model_kwargs = _chosen(model_kwargs, kept)
            rows, ids_RT = rows[kept], ids_RT[kept]
        inputs = model.prepare_inputs_for_generation(ids_RT, next_sequence_length=1, **model_kwargs)
        outputs = model(**inputs, return_dict=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
        logits_RV = outputs.logits[:, -1].float()


def _chosen(model_kwargs: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """The arguments of a forward for some of the rows, or for rows several times over."""
    chosen = dict(model_kwargs)
    for name, value in model_kwargs.items():
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            # Masks are `_RT`; positions of several axes have their rows in the last but one dimension too.
            chosen[name] = value.index_select(value.ndim - 2, index)
        elif hasattr(value, "reorder_cache"):
            value.reorder_cache(index)
    return chosen


def _look_for_texts(task: Task, rows: Tensor, step: int, ended: list[bool]) -> None:
    """Mark the rows whose last token completes a stop text."""
    begin = max(0, step + 1 - task.texts.window)
    for at, tokens in enumerate(task.token_RS[rows, begin : step + 1].tolist()):
        ended[at] = ended[at] or task.texts.ends(tokens)
