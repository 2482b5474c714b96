"""Losses over answers: a pair is two rows of the length that is asked for, and the estimate of each is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pegbox.plan import compose
from pegbox_memory.batches import batch_for, batch_of, kind_of
from pegbox_memory.estimate import estimate

Config = Callable[..., dict[str, Any]]


def with_loss(config: dict[str, Any], *plugins: str) -> dict[str, Any]:
    others = [name for name in config["plugins"] if name not in ("sft",)]
    return {**config, "plugins": [*others, *plugins]}


def loss_of(name: str) -> Any:
    from pegbox import hooks

    ctx = compose({"model": {"name": "m"}, "plugins": [name]})
    return ctx.call(hooks.build_loss, ctx, None)


@pytest.mark.parametrize(("name", "kind"), [("sft", "plain"), ("orpo", "pairs"), ("dpo", "pairs"), ("reward", "pairs")])
def test_what_rows_a_loss_takes_is_found_by_asking_it(name: str, kind: str) -> None:
    assert kind_of(loss_of(name)) == kind


@pytest.mark.parametrize("packed", [False, True])
def test_documents_of_a_made_up_batch_are_those_of_its_borders(packed: bool) -> None:
    batch = batch_of(3, 7, torch.device("cpu"), packed=packed)
    ends = batch.cu_seqlens_S[1:] - 1 if packed else torch.tensor([6, 13, 20])
    assert batch.last_D.tolist() == ends.tolist()
    assert batch.document_N.tolist() == torch.searchsorted(ends, batch.trained_N).tolist()


def test_a_pair_is_two_rows_with_signs_and_what_the_reference_said() -> None:
    batch = batch_for(loss_of("dpo"), "pairs", 3, 5, torch.device("cpu"), packed=False)
    assert batch.input_ids_BT.shape == (6, 5)
    assert batch.sign_D.tolist() == [1, -1] * 3
    assert batch.extra["reference_logps"].value.shape == batch.trained_N.shape


def test_preferences_need_the_memory_of_twice_the_rows(config_of: Config) -> None:
    plain = estimate(config_of(), tokens=16, micro_batch=4).allocated
    pairs = estimate(with_loss(config_of(), "orpo"), tokens=16, micro_batch=2).allocated
    assert pairs == pytest.approx(plain, rel=0.05)


def test_packed_preferences_need_the_memory_of_as_many_tokens(config_of: Config) -> None:
    packing = {"packing": {"length": 32}}
    plain = estimate(config_of("packing", **packing), micro_batch=4).allocated
    pairs = estimate(with_loss(config_of("packing", **packing), "orpo"), micro_batch=4).allocated
    assert pairs == pytest.approx(plain, rel=0.05)
