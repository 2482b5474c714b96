"""Plugins for tests: a random Llama, prompts, a small honest sampler, and a reward.

`Plugin` owns processor, dataset, model, export, `generate_rollouts` and `sync_weights`, and scores. The sampler runs
the policy itself, token by token; its randomness is a function of the seed, the prompt's place and the sample's number.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pegbox.hooks import hookimpl
from pegbox.rollouts import Rollout, RolloutBatch, RolloutRequest, Score, SyncReceipt, WeightUpdate
from pegbox.rows import UNTRAINED, Batch, Example
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, ExportRequest, Item, Model, ModelRequest, Outputs, Processor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, PAD, EOS, WANTED = 24, 0, 1, 7
ENDS = (PAD, EOS)


class TinyRlConfig(Section):
    """What data, engine and reward are like."""

    rows: int = setting(24, "Prompts.", unit="rows")
    eval_rows: int = setting(0, "Held-out prompts.", unit="rows")
    capacity: int | None = setting(None, "Completions are packed into bins of so many tokens.", unit="tokens")
    trained: bool = setting(False, "Rows have trained tokens: they are no prompts.")
    lag: int = setting(0, "How many versions the engine stays behind.", unit="steps")
    deaf: bool = setting(False, "The engine keeps its first version.")
    noise: float = setting(0.0, "What the sampler's log-probabilities are wrong by.", unit="nats")
    reward: str = setting("wanted", "wanted, none, nan.")


class Tokenizer:
    """Tokens as numbers."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return " ".join(map(str, ids))


class Rows:
    """Prompts of three to five tokens; the column `number` is their number."""

    def __init__(self, config: TinyRlConfig, split: str) -> None:
        self.split, self.fingerprint, self._config = split, f"{config.rows}/{split}", config
        self._rows = [self._row(split, at) for at in range(config.rows if split == "train" else config.eval_rows)]

    def _row(self, split: str, at: int) -> Example:
        source = random.Random(f"{split}/{at}")
        ids = [source.randrange(2, VOCABULARY) for _ in range(source.randint(3, 5))]
        labels = ids if self._config.trained else [UNTRAINED] * len(ids)
        return Example(input_ids=np.array(ids), labels=np.array(labels), columns={"number": at})

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        return f"{self.split}.jsonl:{index + 1}"


class PackedRows(Rows):
    """Prompts stay alone; what is made of them is packed."""

    def bins(self, order: Sequence[int]) -> list[list[int]]:
        return [[row] for row in order]

    def fit(self, lengths: Sequence[int]) -> list[list[int]]:
        bins: list[list[int]] = []
        room = 0
        for row, length in enumerate(lengths):
            if not bins or room < length:
                bins.append([])
                room = self._config.capacity or 0
            bins[-1].append(row)
            room -= length
        return bins


class Rule:
    """What a head does to logits beside the projection."""

    softcap: float | None = None


class Head(torch.nn.Module):
    """The seam that `hf` offers: log-probabilities from hidden states."""

    rule = Rule()

    def forward(self, hidden_NH: Any, projection: Any, targets_N: Any, needs: frozenset[str]) -> Outputs:
        logps_NV = projection(hidden_NH).float().log_softmax(-1)
        logps_N = logps_NV.gather(-1, targets_N[:, None]).squeeze(-1)
        return Outputs(logps_N=logps_N, entropy_N=-(logps_NV.exp() * logps_NV).sum(-1) if "entropy" in needs else None)


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(7)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, pad_token_id=PAD, eos_token_id=EOS, num_key_value_heads=2, **sizes)
    )
    model.token_head = Head()
    return model


def compute(module: Any, batch: Batch, needs: frozenset[str]) -> Outputs:
    hidden_BTH = module.model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    ).last_hidden_state
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    return module.token_head(hidden_BTH.flatten(0, 1)[batch.trained_N], module.lm_head, targets_N, needs)


class Plugin:
    """Owns what a run needs beyond grpo, the optimizer and the trainer.

    Attributes:
        requests: what was asked for, in order.
        versions: the weights that were synced.
    """

    def __init__(self) -> None:
        self.requests: list[RolloutRequest] = []
        self.versions: list[int] = []
        self.model: Model | None = None

    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=TinyRlConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=Tokenizer(), pad_id=PAD, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, ctx, split) -> Rows | None:
        config = ctx.section(TinyRlConfig)
        rows = (Rows if config.capacity is None else PackedRows)(config, split)
        return rows if len(rows) else None

    @hookimpl
    def load_model(self, ctx, request: ModelRequest) -> Model:
        self.model = Model(module=build_model(), name="tiny", base="tiny", format="transformers", compute=compute)
        return self.model

    @hookimpl
    def export_model(self, ctx, model: Model, request: ExportRequest) -> Path:
        return request.folder

    @hookimpl
    def sync_weights(self, ctx, update: WeightUpdate) -> SyncReceipt:
        own = dict(self.model.module.named_parameters())
        assert all(torch.equal(own[name], tensor) for name, tensor in update.tensors)
        if not (ctx.section(TinyRlConfig).deaf and self.versions):
            self.versions.append(update.version)
        return SyncReceipt(engine="tiny", version=self.versions[-1], evidence="compared")

    @hookimpl
    def generate_rollouts(self, ctx, request: RolloutRequest) -> RolloutBatch:
        self.requests.append(request)
        config = ctx.section(TinyRlConfig)
        version = max(0, self.versions[-1] - config.lag)
        return sample(self.model.module, request, version, config.noise)

    @hookimpl
    def score_rollouts(self, ctx, rollouts: RolloutBatch) -> Sequence[Score]:
        kind = ctx.section(TinyRlConfig).reward
        if kind != "wanted":
            return [Score(name=kind, values_R=(None if kind == "none" else float("nan"),) * len(rollouts.rollouts))]
        share = tuple(r.completion.count(WANTED) / len(r.completion) for r in rollouts.rollouts)
        short = tuple(None if r.columns["number"] % 2 else -0.01 * len(r.completion) for r in rollouts.rollouts)
        return [Score(name="wanted", values_R=share), Score(name="short", values_R=short)]


@torch.no_grad()
def sample(module: Any, request: RolloutRequest, version: int, noise: float = 0.0) -> RolloutBatch:
    """Completions by the plainest loop: one forward over everything for each token."""
    sampling, places = request.sampling, [(p, s) for p in range(len(request.prompts)) for s in range(request.samples)]
    ids = [list(request.prompts[p]) for p, _ in places]
    logps: list[list[float]] = [[] for _ in places]
    draws = [random.Random(hashlib.sha256(f"{sampling.seed}/{p}/{s}".encode()).hexdigest()) for p, s in places]
    for _ in range(sampling.max_tokens):
        width = max(map(len, ids))
        padded = torch.tensor([row + [PAD] * (width - len(row)) for row in ids])
        ends = torch.tensor([len(row) - 1 for row in ids])
        logits_RV = module(input_ids=padded, use_cache=False).logits[torch.arange(len(ids)), ends]
        logps_RV = (logits_RV / (sampling.temperature or 1.0)).log_softmax(-1)
        for at, row in enumerate(ids):
            if logps[at] and row[-1] in ENDS:
                continue
            if sampling.temperature == 0:
                token = int(logps_RV[at].argmax())
            else:
                token = int(
                    torch.searchsorted(logps_RV[at].exp().cumsum(0), draws[at].random()).clamp(max=VOCABULARY - 1)
                )
            row.append(token)
            logps[at].append(float(logps_RV[at, token]) + noise * (at % 2))
    return RolloutBatch(
        rollouts=tuple(
            Rollout(
                prompt=request.prompts[p],
                completion=tuple(row[len(request.prompts[p]) :]),
                logps=tuple(values),
                first_version=version,
                last_version=version,
                finished=row[-1] in ENDS,
                columns=request.columns[p],
            )
            for (p, _), row, values in zip(places, ids, logps, strict=True)
        ),
        samples=request.samples,
    )


def config_of(folder: Path, **keys: Any) -> dict[str, Any]:
    """A config: `grpo`, `adamw`, `tiny`, `trainer` are sections; the rest are keys of the core."""
    names = ("grpo", "adamw", "tiny", "trainer")
    sections: Mapping[str, Any] = {name: keys.pop(name, {}) for name in names}
    trainer = {"progress": "none", "log_every": 1, "micro_batch": 4, "batch": 4, "max_steps": 4, "precision": "fp32"}
    grpo = {"samples": 4, "max_completion_length": 5, "completions": 4}
    return {
        "model": {"name": "tiny"},
        "plugins": ["tiny", *keys.pop("before", ()), "grpo", "adamw", "trainer", *keys.pop("after", ())],
        "output": str(folder),
        "tiny": dict(sections["tiny"]),
        "grpo": {**grpo, **sections["grpo"]},
        "adamw": {"learning_rate": 3e-3, "schedule": "constant", **sections["adamw"]},
        "trainer": {**trainer, **sections["trainer"]},
        **keys,
    }


def run(config: Mapping[str, Any], tiny: Plugin | None = None, **instances: object) -> Any:
    """Run a config in this process; returns the outcome."""
    from pegbox.plan import compose
    from pegbox.run import execute

    return execute(compose(config, instances={"tiny": tiny or Plugin(), **instances}))


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """`metrics.jsonl` without the fields that tell the time."""
    import json

    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("_s", "memory_bytes")
    return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines if line["kind"] == kind]
