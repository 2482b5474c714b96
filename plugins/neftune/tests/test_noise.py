"""The noise has the paper's size, and depends on what it should and on nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.events import Event, Stepped
from pegbox.hooks import hookimpl
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.rows import Batch, Example
from pegbox.run import execute
from pegbox.testing.tiny import collate, tiny_batches, tiny_model
from pegbox_neftune.noise import EmbeddingNoise
from safetensors.torch import load_file

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")
WIDTH = 64


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def noise(seed: int = 0, alpha: float = 5.0) -> EmbeddingNoise:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["neftune"], "seed": seed})
    return EmbeddingNoise(ctx, alpha)


def documents(count: int = 4, longest: int = 40) -> list[list[int]]:
    source = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, longest, (count,), generator=source).tolist()
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


def padded(rows: list[list[int]]) -> Batch:
    return collate([Example(input_ids=ids, labels=ids) for ids in rows])


def packed(rows: list[list[int]], padding: int = 0) -> Batch:
    ids = [token for row in rows for token in row] + [0] * padding
    lengths = [len(row) for row in rows] + ([padding] if padding else [])
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.tensor([[at for length in lengths for at in range(length)]])
    return Batch(
        input_ids_BT=torch.tensor([ids]),
        targets_BT=torch.tensor([ids]),
        trained_N=torch.arange(0),
        position_ids_BT=positions,
        cu_seqlens_S=borders,
        max_seqlen=max(lengths),
    )


def test_it_is_uniform_within_the_papers_bound() -> None:
    rows = documents(6, 200)
    values = noise().of(padded(rows), WIDTH)
    for row, ids in enumerate(rows):
        bound = 5.0 / (len(ids) * WIDTH) ** 0.5
        own = values[row, : len(ids)] / bound
        assert own.abs().max() <= 1.0
        assert own.abs().max() > 0.99
        assert abs(own.mean()) < 4 / (3 * own.numel()) ** 0.5
        assert abs(own.var() * 3 - 1) < 0.1
        halves = own[: len(ids) // 2].flatten(), own[-(len(ids) // 2) :].flatten()
        assert abs(torch.corrcoef(torch.stack(halves))[0, 1]) < 5 / halves[0].numel() ** 0.5


def test_a_document_has_the_same_noise_alone_padded_and_packed() -> None:
    rows = documents()
    together, one_row = noise().of(padded(rows), WIDTH), noise().of(packed(rows, padding=5), WIDTH)[0]
    start = 0
    for row, ids in enumerate(rows):
        alone = noise().of(padded([ids]), WIDTH)[0]
        torch.testing.assert_close(together[row, : len(ids)], alone, rtol=0, atol=0)
        torch.testing.assert_close(one_row[start : start + len(ids)], alone, rtol=0, atol=0)
        start += len(ids)


def test_another_step_seed_or_document_has_other_noise() -> None:
    batch = padded([[1, 2, 3, 4], [1, 2, 3, 5]])
    first = noise().of(batch, WIDTH)
    later = noise()
    later.step = 1
    assert not torch.allclose(first, later.of(batch, WIDTH))
    assert not torch.allclose(first, noise(seed=1).of(batch, WIDTH))
    assert not torch.allclose(first[0], first[1])
    torch.testing.assert_close(noise(alpha=10.0).of(batch, WIDTH), 2 * first)


def test_training_sees_the_noise_and_evaluation_does_not() -> None:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["neftune"]})
    model, plain, batch = tiny_model(placed=True), tiny_model(), tiny_batches()[0]
    log = PatchLog()
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "adapted"))
    wrapper = ctx.kernel.active["neftune"].instance.place_model()
    next(wrapper)
    with pytest.raises(StopIteration) as done:
        wrapper.send(model)
    placed = done.value.value
    needs = frozenset({"hidden"})
    expected = plain.compute(plain.module, batch, needs).hidden_BTH
    assert not torch.allclose(placed.forward(batch, needs).hidden_BTH, expected, atol=1e-4)
    model.module.eval()
    torch.testing.assert_close(placed.forward(batch, needs).hidden_BTH, expected, rtol=0, atol=0)


class Break:
    @hookimpl
    def on_event(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            raise KeyboardInterrupt


def run(folder: Path, instance: object = None, dropout: float = 0.1, **trainer: Any) -> None:
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "neftune", "sft", "adamw", "trainer", *(["break"] if instance else [])],
        "tiny_llama": {"rows": 24, "dropout": dropout},
        "trainer": {"progress": "none", "max_steps": 4, "save_every": 2, "device": "cpu", "log_every": 1, **trainer},
        "resume": "auto",
        "output": str(folder),
    }
    execute(compose(config, instances={"break": instance} if instance else None))


def test_a_resumed_run_is_bit_identical(tmp_path: Path) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Break())
    run(tmp_path / "run")
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_the_loss_does_not_depend_on_the_split_of_a_step(tmp_path: Path) -> None:
    losses = []
    for name, shape in (("one", (4, 1)), ("two", (2, 2)), ("four", (1, 4))):
        run(tmp_path / name, micro_batch=shape[0], accumulation=shape[1], max_steps=2, dropout=0.0)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_a_model_without_embeddings_is_refused() -> None:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["neftune"]})
    model = replace(tiny_model(), module=torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no input embeddings"):
        ctx.each(hooks.patch_modules, ctx, model, "adapted")
