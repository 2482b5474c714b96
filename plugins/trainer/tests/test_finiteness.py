"""A loss or gradient that is not finite stops the run, names the rows, and is never followed by a checkpoint."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import DataError, RunError
from pegbox.hooks import hookimpl
from tiny_runs import records, run


@pytest.mark.parametrize("log_every", [1, 4, 100])
@pytest.mark.parametrize("save_every", [1, 3, None])
def test_a_loss_that_is_not_finite_names_its_batch(
    config: Any, tmp_path: Path, log_every: int, save_every: int | None
) -> None:
    keys = {"shuffle": False, "micro_batch": 1, "accumulation": 2, "max_steps": 10, "tiny": {"poison": [11]}}
    with pytest.raises(RunError) as failure:
        run(config(log_every=log_every, save_every=save_every, keep=None, **keys))
    assert failure.value.what == "step 6: the loss of the batch train.jsonl:12 is not finite"
    assert "no checkpoint was saved after it" in failure.value.why
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*"))
    assert saved == [f"step-{step:08d}" for step in range(1, 6) if save_every and step % save_every == 0]
    logged = records(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else []
    assert all(math.isfinite(record["loss"]) and record["step"] < 6 for record in logged)


def test_of_several_bad_steps_the_first_is_named(config: Any) -> None:
    keys = {"shuffle": False, "micro_batch": 2, "max_steps": 8, "tiny": {"poison": [13, 6, 7]}}
    with pytest.raises(RunError, match=r"step 4: the loss of the batch train.jsonl:[78], train.jsonl:[78] is"):
        run(config(log_every=8, **keys))


class Spoiler:
    """Makes one gradient infinite, as an overflow would."""

    @hookimpl
    def on_event(self, event: Any) -> None:
        if type(event).__name__ == "GradientsReady" and event.step == 3:
            next(event.model.module.parameters()).grad[0, 0] = math.inf


def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(config: Any, tmp_path: Path) -> None:
    keys = {"shuffle": False, "micro_batch": 2, "max_steps": 5, "plugins": ["spoiler"], "save_every": 1, "keep": None}
    with pytest.raises(RunError, match=r"step 3: the loss is 4\.\d+ and the norm of its gradient inf") as failure:
        run(config(log_every=5, **keys), spoiler=Spoiler())
    assert {"train.jsonl:5", "train.jsonl:6"} <= set(failure.value.what.replace(",", "").split())
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


class Steep:
    """Makes the loss so steep that fp16 gradients overflow at first; keeps the weights after each step."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.weights: list[torch.Tensor] = []

    @hookimpl(wrapper=True)
    def build_loss(self) -> Any:
        from pegbox.types import LossOutput, Term

        inner, weight = (yield), self.weight

        class Loss:
            needs, scope, counts = inner.needs, inner.scope, inner.counts

            def __call__(self, batch: Any, outputs: Any) -> LossOutput:
                (term,) = inner(batch, outputs).terms
                return LossOutput(terms=(Term(name="sft", total=weight * term.total, count=term.count),))

        return Loss()

    @hookimpl
    def on_event(self, event: Any) -> None:
        if type(event).__name__ == "Stepped":
            self.weights.append(event.model.module.lm_head.weight.detach().clone())


def test_fp16_skips_steps_whose_gradient_overflows_and_goes_on(config: Any, tmp_path: Path) -> None:
    steep = Steep(1e2)
    assert run(config(max_steps=10, precision="fp16", plugins=["steep"]), steep=steep).step == 10
    logged = records(tmp_path / "run", "train")
    scales = [record["loss_scale"] for record in logged]
    skipped = [after < before for before, after in itertools.pairwise([65536.0, *scales])]
    assert 0 < sum(skipped) < 10
    assert [record["grad_norm"] is None for record in logged] == skipped, "an overflow has no norm"
    moves = [not torch.equal(*pair) for pair in itertools.pairwise(steep.weights)]
    assert moves == [not skip for skip in skipped[1:]]


def test_fp16_stops_when_gradients_overflow_at_every_scale(config: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the fp16 loss scale fell to 0\.5"):
        run(config(max_steps=40, precision="fp16", plugins=["steep"]), steep=Steep(1e12))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_without_a_trained_token_stops_the_run(config: Any) -> None:
    with pytest.raises(DataError, match=r"a step of 2 rows has no trained token: train.jsonl:3, train.jsonl:4"):
        run(config(shuffle=False, micro_batch=2, max_steps=3, tiny={"untrained": [2, 3]}))


def test_counts_of_nothing_from_another_source_are_named(config: Any) -> None:
    class Emptier:
        """Refines batches into ones without a trained token, as a faulty source would."""

        @hookimpl(wrapper=True)
        def build_loss(self) -> Any:
            loss = yield
            loss.counts = lambda batch: {"sft": 0.0}
            return loss

    with pytest.raises(RunError, match=r"step 1: no token is trained in train.jsonl"):
        run(config(max_steps=2, plugins=["emptier"]), emptier=Emptier())


def test_an_evaluation_that_is_not_finite_names_its_batch(config: Any) -> None:
    class Poisoner:
        @hookimpl(wrapper=True)
        def build_dataset(self, split: str) -> Any:
            rows = yield
            if split == "eval":
                rows._rows[4] = type(rows[4])(input_ids=[1, 2, 127], labels=[1, 2, 127])
            return rows

    keys = {"max_steps": 2, "eval_every": 1, "eval_micro_batch": 1, "tiny": {"eval_rows": 6}}
    with pytest.raises(RunError, match=r"the evaluation loss of the batch eval.jsonl:5 is not finite"):
        run(config(plugins=["poisoner"], **keys), poisoner=Poisoner())
