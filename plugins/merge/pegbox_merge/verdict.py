"""`merge.json`: what was merged, and whether the result is the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORD = "merge.json"


@dataclass(frozen=True)
class Limits:
    """What a merge may cost, by the data type of its weights.

    Attributes:
        kl: mean Kullback-Leibler divergence of next tokens, in nats.
        top1: share of positions with the same likeliest token.
        near: two tokens this near in log-probability, in nats, count as the same.
        noise: a divergence below it is rounding, whatever the adapter does.
        score: error of a classifier's predictions, as a share of their spread; a tenth of it is rounding.
    """

    kl: float
    top1: float
    near: float
    noise: float
    score: float


LIMITS = {
    "float32": Limits(kl=1e-5, top1=0.999, near=1e-3, noise=1e-7, score=1e-4),
    "float16": Limits(kl=1e-4, top1=0.99, near=1e-2, noise=1e-6, score=1e-2),
    "bfloat16": Limits(kl=5e-3, top1=0.98, near=0.125, noise=1e-5, score=0.1),
    "quantized": Limits(kl=1e-2, top1=0.97, near=0.125, noise=1e-5, score=0.2),
}
"""From the finest to the coarsest; `quantized`: the trained model computes with a quantized base.

Logits of the likeliest tokens lie between 16 and 32, where neighbours in bfloat16 are 0.125 apart: two tokens nearer
than that change places by rounding the logits alone.
"""
SHARE = 0.25
"""The largest part of the adapter's own effect that merging may lose."""


@dataclass(frozen=True)
class Figures:
    """The merged model against the adapter on its base, over all positions of the probe prompts.

    Attributes:
        kl: mean divergence of the merged model's next tokens from the trained model's, in nats.
        kl_base: the same for the base without the adapter: the size of what training changed.
        top1: share of positions with the same likeliest token.
        prompts_equal: the folder's tokenizer and template give the same token ids as the run's.
        ends_equal: answers end at the same tokens.
    """

    kl: float
    kl_base: float
    top1: float
    positions: int
    prompts_equal: bool
    ends_equal: bool

    def problems(self, dtype: str) -> list[str]:
        """Why the merge is not good, by the limits of a data type; nothing if it is."""
        limits, found = LIMITS[dtype], []
        if not self.kl <= limits.kl:
            found.append(f"next tokens diverge by {self.kl:.2g} nats (limit for {dtype}: {limits.kl:g})")
        if not self.kl <= max(SHARE * self.kl_base, limits.noise):
            found.append(f"{self.kl:.2g} nats is more than a quarter of what training changed ({self.kl_base:.2g})")
        if self.top1 < limits.top1:
            found.append(f"the likeliest token is the same at {self.top1:.1%} (limit for {dtype}: {limits.top1:.1%})")
        if not self.prompts_equal:
            found.append("tokenizer or chat template give other token ids than the run's")
        if not self.ends_equal:
            found.append("answers end at other tokens than the run's")
        return found

    def __str__(self) -> str:
        return (
            f"checked on {self.positions} positions: divergence {self.kl:.2g} nats "
            f"(without the adapter {self.kl_base:.2g}), same likeliest token at {self.top1:.1%}"
        )


@dataclass(frozen=True)
class ScoreFigures:
    """The same of a model that classifies, over all positions of the probe prompts.

    Attributes:
        error: of the merged model's predictions, as a share of the spread of the trained model's.
        error_base: the same for the base under the trained head: the size of what the adapter changed.
        padding_equal: the folder names the token that pads rows as the run does.
    """

    error: float
    error_base: float
    positions: int
    prompts_equal: bool
    padding_equal: bool

    def problems(self, dtype: str) -> list[str]:
        """Why the merge is not good, by the limits of a data type; nothing if it is."""
        limit, found = LIMITS[dtype].score, []
        if not self.error <= limit:
            found.append(f"predictions differ by {self.error:.2g} of their spread (limit for {dtype}: {limit:g})")
        if not self.error <= max(SHARE * self.error_base, limit / 10):
            found.append(f"{self.error:.2g} is more than a quarter of what the adapter changed ({self.error_base:.2g})")
        if not self.prompts_equal:
            found.append("tokenizer or chat template give other token ids than the run's")
        if not self.padding_equal:
            found.append("config or tokenizer name another padding token than the run's")
        return found

    def __str__(self) -> str:
        return (
            f"checked on {self.positions} positions: predictions differ by {self.error:.2g} of their spread "
            f"(without the adapter {self.error_base:.2g})"
        )


def coarsest(*names: str) -> str:
    """The one of these whose limits are the widest: the rounding of both models counts."""
    return max(names, key=list(LIMITS).index)


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def add_figures(path: Path, figures: Figures | ScoreFigures, problems: list[str], limits: Limits) -> None:
    """Say in the record how the check ended."""
    record = json.loads(path.read_text(encoding="utf-8"))
    record["status"] = "failed" if problems else "checked"
    record["check"] = {**asdict(figures), "limits": asdict(limits), "problems": problems}
    write_record(path, record)
