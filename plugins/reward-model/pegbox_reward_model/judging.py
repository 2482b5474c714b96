"""One reward model: opened frozen beside the policy, and asked for scores.

A sequence classifier of transformers scores the rightmost token that is not `pad_token_id`; so do we, which is the last
token of each text. Texts are put into batches in an order of their own, by length and tokens, each text once: a
completion's score depends neither on its place nor on how often it was sampled.

    R  rollouts    B  rows    T  tokens    C  labels
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from pegbox.errors import RunError, UserError, did_you_mean
from pegbox.rows import UNTRAINED, Batch
from pegbox.types import ModelOptions, ModelRequest

from pegbox_reward_model.rendering import Renderer

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import Rollout
    from pegbox.types import Model
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from pegbox_reward_model.config import JudgeEntry, RewardModelConfig

VALUES = frozenset({"values"})
FORMAT = "transformers"
LABELS = {"outcome": 1, "process": 2}
CLASSIFIES: dict[str, Literal["sequence", "token"]] = {"outcome": "sequence", "process": "token"}

Text = tuple[int, ...]
Places = tuple[int, ...]


def open_judge(ctx: Context, settings: RewardModelConfig, wanted: JudgeEntry) -> Judge:
    """Open one model on the run's device, with the tokenizer that lies beside it.

    Raises:
        UserError: it is not there, has no head that was trained, or no tokenizer.
        ConfigError: steps cannot be told apart with its tokenizer.
    """
    options = ModelOptions(classify=CLASSIFIES[wanted.kind], labels=LABELS[wanted.kind], dtype=wanted.dtype)
    request = ModelRequest(name=wanted.name, format=FORMAT, role="reward", revision=wanted.revision, options=options)
    renderer = Renderer(tokenizer_of(ctx, wanted), ctx.processor.tokenizer, settings.prompt)
    if wanted.kind == "process":
        renderer.separator(wanted.step_separator)
    return Judge(ctx, wanted, renderer, ctx.open_model("reward", request), settings.micro_batch)


def tokenizer_of(ctx: Context, wanted: JudgeEntry) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a reward model.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    folder = ctx.config.path(wanted.name)
    address = str(folder) if folder.is_dir() else wanted.name
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(address, revision=wanted.revision or "main")
    except (OSError, ValueError, KeyError) as error:
        told = str(error).splitlines()[0]
        if folder.is_dir():
            raise UserError(
                f"the tokenizer of the reward model '{wanted.name}' does not open: {told}",
                "A reward model reads its own tokens.",
                "Put its tokenizer files into its folder, or correct the name.",
            ) from error
        near = [path.name for path in folder.parent.glob("*") if path.is_dir()]
        hint = did_you_mean(folder.name, near, "Beside it are:") if near else ""
        raise UserError(
            f"the reward model '{wanted.name}' is no folder, and the hub does not give it",
            f"There is no {folder}; and: {told}",
            f"Correct the name in reward-model.models. {hint}".strip(),
        ) from error
    return found


@dataclass(frozen=True)
class Judge:
    """A reward model and how it is asked.

    Attributes:
        ctx: for the device.
        wanted: its entry in the config.
        renderer: what it reads.
        model: opened, frozen and placed.
        micro_batch: texts in one forward.
    """

    ctx: Context
    wanted: JudgeEntry
    renderer: Renderer
    model: Model
    micro_batch: int

    @property
    def name(self) -> str:
        """The name of its score."""
        return self.wanted.score_name

    def score(self, rollouts: Sequence[Rollout]) -> tuple[float | None, ...]:
        """One number for each completion; None where there is nothing to judge: no token, or no step.

        Raises:
            RunError: a score is not finite.
        """
        asked = [self._asked(rollout) for rollout in rollouts]
        texts = sorted({one for one in asked if one is not None}, key=lambda one: (len(one[0]), one))
        found: dict[tuple[Text, Places], float] = {}
        for start in range(0, len(texts), self.micro_batch):
            part = texts[start : start + self.micro_batch]
            found.update(zip(part, self._scores(part), strict=True))
        values_R = tuple(None if one is None else found[one] for one in asked)
        for rollout, value in zip(rollouts, values_R, strict=True):
            if value is not None and not math.isfinite(value):
                raise RunError(
                    f"{self.name} is {value} for a completion of {len(rollout.completion)} tokens",
                    "A reward is a number.",
                    "Open the reward model in float32: set dtype of its entry.",
                )
        return values_R

    def _asked(self, rollout: Rollout) -> tuple[Text, Places] | None:
        """A text, and the places in it that are scored."""
        if self.wanted.kind == "process":
            ids, places = self.renderer.steps(rollout, self.wanted.step_separator)
        else:
            ids = self._without_padding(self.renderer.answer(rollout))
            places = [len(ids) - 1] if ids else []
        cut = max(0, len(ids) - (self.wanted.max_length or len(ids)))
        kept = tuple(place - cut for place in places if place >= cut)
        return (tuple(ids[cut:]), kept) if kept else None

    def _without_padding(self, ids: list[int]) -> list[int]:
        padding = self.model.module.config.get_text_config().pad_token_id
        end = len(ids)
        while end > 0 and ids[end - 1] == padding:
            end -= 1
        return ids[:end]

    def _scores(self, texts: Sequence[tuple[Text, Places]]) -> Iterator[float]:
        assert self.model.forward is not None, "a second model is placed"
        with torch.no_grad():
            values_BTC = self.model.forward(batch_of(texts).to(self.ctx.runtime.device), VALUES).values_BTC
        assert values_BTC is not None, "the model gives what is asked for"
        values_BTC = values_BTC.float().cpu()
        for row, (_, places) in enumerate(texts):
            yield self._reduced(values_BTC[row, list(places)])

    def _reduced(self, values_SC: Tensor) -> float:
        """One number from what was predicted at the places of a text."""
        if self.wanted.kind == "outcome":
            return float(values_SC[0, 0])
        right_S = values_SC.softmax(-1)[:, self.wanted.label]
        made = {"min": right_S.min(), "mean": right_S.mean(), "last": right_S[-1], "product": right_S.prod()}
        return float(made[self.wanted.steps])


def batch_of(texts: Sequence[tuple[Text, Places]]) -> Batch:
    """Texts as one micro-batch, padded on the right; nothing in it is trained."""
    width = max(len(ids) for ids, _ in texts)
    input_ids_BT = torch.zeros(len(texts), width, dtype=torch.int64)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, (ids, _) in enumerate(texts):
        input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        mask_BT[row, : len(ids)] = 1
    return Batch(
        input_ids_BT=input_ids_BT,
        targets_BT=torch.full_like(input_ids_BT, UNTRAINED),
        trained_N=torch.zeros(0, dtype=torch.int64),
        attention_mask_BT=None if bool(mask_BT.all()) else mask_BT,
    )
