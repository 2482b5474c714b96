"""A plugin for tests: a random Llama of 100,000 parameters, and random rows, each from a seed.

It answers what the packages under test do not: processor, dataset, model, export. The forward is written with
transformers' trunk and plain torch, independent of other plugins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from pegbox.hooks import hookimpl
from pegbox.rows import UNTRAINED, Batch, Example
from pegbox.section import Section, setting
from pegbox.types import ConfigSection, ExportRequest, Item, Model, ModelRequest, Outputs, Processor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 128
PAD, POISON = 0, 127


class TinyLlamaConfig(Section):
    """What the random model and rows are like."""

    rows: int = setting(48, "Training rows.", unit="rows")
    eval_rows: int = setting(0, "Held-out rows.", unit="rows")
    shortest: int = setting(3, "Shortest document.", unit="tokens")
    longest: int = setting(24, "Longest document.", unit="tokens")
    documents: int = setting(1, "Documents packed into each row.", unit="documents")
    poison: tuple[int, ...] = setting((), "Rows whose loss is not a number.")
    untrained: tuple[int, ...] = setting((), "Rows without a trained token.")
    stream: bool = setting(False, "Give the training rows as a stream that begins anew without end.")
    capacity: int | None = setting(None, "Pack neighbours of the order into bins of so many tokens.", unit="tokens")
    dropout: float = setting(0.0, "Dropout of attention weights.", unit="1")


class Rows:
    """Random rows; the first tokens of a document are a prompt, which is not trained."""

    def __init__(self, config: TinyLlamaConfig, split: str) -> None:
        self.split, self.fingerprint = split, f"{config!r}/{split}"
        self._rows = [self._row(config, split, index) for index in range(self._count(config))]

    def _count(self, config: TinyLlamaConfig) -> int:
        return config.rows if self.split == "train" else config.eval_rows

    @staticmethod
    def _row(config: TinyLlamaConfig, split: str, index: int) -> Example:
        source = random.Random(f"{split}/{index}")
        input_ids: list[int] = []
        labels: list[int] = []
        documents = []
        for _ in range(config.documents):
            length = source.randint(config.shortest, config.longest)
            tokens = [source.randint(1, POISON - 1) for _ in range(length)]
            if split == "train" and index in config.poison:
                tokens[-1] = POISON
            prompt = source.randint(0, length // 2)
            trained = not (split == "train" and index in config.untrained)
            labels += [token if trained and at >= prompt else UNTRAINED for at, token in enumerate(tokens)]
            input_ids += tokens
            documents.append(length)
        packed = tuple(documents) if config.documents > 1 else ()
        return Example(input_ids=input_ids, labels=labels, documents=packed)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        return f"{self.split}.jsonl:{index + 1}"


class PackedRows:
    """Rows with bins made in the plainest way: a bin is closed by the row that does not fit any more."""

    def __init__(self, rows: Rows, capacity: int) -> None:
        self.split, self.fingerprint, self._rows, self._capacity = rows.split, rows.fingerprint, rows, capacity

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        return self._rows[index]

    def describe(self, index: int) -> str:
        return self._rows.describe(index)

    def bins(self, order: Sequence[int]) -> list[list[int]]:
        return [[order[at] for at in part] for part in self.fit([len(self._rows[row].input_ids) for row in order])]

    def fit(self, lengths: Sequence[int]) -> list[list[int]]:
        bins, room = [], 0
        for row, length in enumerate(lengths):
            if not bins or room < length:
                bins.append([])
                room = self._capacity
            bins[-1].append(row)
            room -= length
        return bins


class Part:
    """Some rows of others."""

    def __init__(self, rows: Rows, numbers: Sequence[int]) -> None:
        self.split, self.fingerprint, self._rows, self._numbers = rows.split, rows.fingerprint, rows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._rows[self._numbers[index]]

    def describe(self, index: int) -> str:
        return self._rows.describe(self._numbers[index])


class Stream:
    """The rows over and over, or once."""

    def __init__(self, rows: Rows, capacity: int | None = None, *, endless: bool = True) -> None:
        self.split, self.fingerprint = rows.split, rows.fingerprint
        self._rows, self._capacity, self._endless, self._at = rows, capacity, endless, 0

    def take(self, rows: int) -> Part | PackedRows:
        upto = self._at + rows if self._endless else min(self._at + rows, len(self._rows))
        part = Part(self._rows, [at % len(self._rows) for at in range(self._at, upto)])
        self._at = upto
        return part if self._capacity is None else PackedRows(part, self._capacity)

    def state_dict(self) -> dict[str, object]:
        return {"at": self._at}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self._at = state_dict["at"]


def build_model(dropout: float = 0.0) -> LlamaForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(1234)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, attention_dropout=dropout, pad_token_id=PAD, **sizes
    )
    return LlamaForCausalLM(config)


def compute(module: torch.nn.Module, batch: Batch, needs: frozenset[str]) -> Outputs:
    """Log-probabilities of the trained tokens."""
    hidden_BTH = module.model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        use_cache=False,
    ).last_hidden_state
    logits_NV = module.lm_head(hidden_BTH.flatten(0, 1)[batch.trained_N]).float()
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    logps_N = logits_NV.log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    return Outputs(logps_N=logps_N.masked_fill(targets_N == POISON, float("nan")))


class Plugin:
    """Owns what a run needs beyond the packages under test."""

    @hookimpl
    def register_config(self) -> ConfigSection:
        return ConfigSection(schema=TinyLlamaConfig)

    @hookimpl
    def register_items(self) -> Sequence[Item]:
        return [Item(kind=kind, name="transformers", target="tiny") for kind in ("model_format", "export_format")]

    @hookimpl
    def load_processor(self) -> Processor:
        return Processor(tokenizer=None, pad_id=PAD, fingerprint="tiny")

    @hookimpl
    def build_dataset(self, ctx, split) -> Rows | PackedRows | Stream | None:
        config = ctx.section(TinyLlamaConfig)
        rows = Rows(config, split)
        if config.stream and split == "train":
            return Stream(rows, config.capacity)
        return (PackedRows(rows, config.capacity) if config.capacity else rows) if len(rows) else None

    @hookimpl
    def load_model(self, ctx, request: ModelRequest) -> Model:
        module = build_model(ctx.section(TinyLlamaConfig).dropout)
        return Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute)

    @hookimpl
    def export_model(self, ctx, model: Model, request: ExportRequest) -> Path:
        if ctx.runtime.rank == 0:
            model.module.save_pretrained(request.folder)
        return request.folder
