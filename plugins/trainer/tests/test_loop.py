"""What the loop does at each step, for whom, and when."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from pegbox.errors import ConfigError, PatchError
from pegbox.events import Signal
from pegbox.hooks import hookimpl
from pegbox.types import ModulePatch
from pegbox_trainer.config import TrainerConfig
from pydantic import ValidationError
from tiny_runs import checkpoint, records, run


class Observer:
    """Keeps what it saw; `answers` maps (event, step) to what it asks for."""

    def __init__(self, answers: dict[tuple[str, int], Signal] | None = None) -> None:
        self.answers, self.seen, self.losses = answers or {}, [], []
        self.metrics: list[tuple[str, int]] = []
        self.rates: list[float] = []

    @hookimpl
    def on_event(self, event: Any) -> Signal | None:
        kind = type(event).__name__
        step = getattr(event, "step", -1)
        self.seen.append((kind, step))
        if kind == "GradientsReady":
            self.rates.append(event.optimizer.param_groups[0]["lr"])
            assert all(p.grad is not None for p in event.model.module.parameters())
        if kind == "Stepped":
            self.losses.append(event.loss.item())
            assert all(p.grad is None for p in event.model.module.parameters())
        return self.answers.get((kind, step))


def test_events_come_in_order(config: Any) -> None:
    observer = Observer()
    run(config(max_steps=2, eval_every=2, save_every=1, tiny={"eval_rows": 3}, plugins=["o"]), o=observer)
    assert observer.seen == [
        ("RunBegins", -1),
        ("RunStarted", 0),
        ("GradientsReady", 1),
        ("Stepped", 1),
        ("Logged", 1),
        ("CheckpointSaved", -1),
        ("GradientsReady", 2),
        ("Stepped", 2),
        ("Logged", 2),
        ("Evaluated", 2),
        ("CheckpointSaved", -1),
        ("RunEnded", -1),
    ]


def test_observers_can_ask_for_a_checkpoint_and_an_evaluation(config: Any, tmp_path: Path) -> None:
    asks = {("Stepped", 2): Signal.SAVE, ("Logged", 3): Signal.EVAL, ("Evaluated", 3): Signal.SAVE}
    keys = {"max_steps": 5, "eval_at_end": False, "keep": None, "tiny": {"eval_rows": 3}, "plugins": ["o"]}
    run(config(**keys), o=Observer(asks))
    assert [record["step"] for record in records(tmp_path / "run", "eval")] == [3]
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000003", "step-00000005"]


def test_logged_figures_are_those_of_the_steps(config: Any, tmp_path: Path) -> None:
    observer = Observer()
    keys = {"max_steps": 7, "log_every": 3, "micro_batch": 5, "accumulation": 2, "plugins": ["o"]}
    outcome = run(config(adamw={"warmup_steps": 2}, **keys), o=observer)
    logged = records(tmp_path / "run", "train")
    assert [record["step"] for record in logged] == [3, 6, 7]
    for record, part in zip(logged, (slice(0, 3), slice(3, 6), slice(6, 7)), strict=True):
        assert record["loss"] == pytest.approx(sum(observer.losses[part]) / len(observer.losses[part]), rel=1e-6)
        assert record["learning_rate"] == observer.rates[part][-1]
        assert record["epoch"] == pytest.approx(record["step"] // 5 + record["step"] % 5 * 10 / 48)
    rows = tiny_llama.Rows(tiny_llama.TinyLlamaConfig(), "train")
    trained = sum(label != -100 for row in range(48) for label in rows[row].labels[1:])
    assert logged[1]["trained_tokens"] > trained >= logged[0]["trained_tokens"] > 0
    assert outcome.metrics["loss"] == logged[-1]["loss"]


def test_trained_tokens_of_an_epoch_are_those_of_the_data(config: Any, tmp_path: Path) -> None:
    run(config(epochs=1, micro_batch=5, accumulation=3, log_every=2))
    rows = tiny_llama.Rows(tiny_llama.TinyLlamaConfig(), "train")
    trained = sum(label != -100 for row in range(48) for label in rows[row].labels[1:])
    assert records(tmp_path / "run", "train")[-1]["trained_tokens"] == trained


def test_evaluation_is_the_mean_over_all_trained_tokens(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 1, "eval_at_start": True, "eval_micro_batch": 3, "tiny": {"eval_rows": 20, "dropout": 0.5}}
    run(config(**keys))
    rows = tiny_llama.Rows(tiny_llama.TinyLlamaConfig(eval_rows=20), "eval")
    model = tiny_llama.build_model().eval()
    total, count = 0.0, 0
    for index in range(20):
        ids = torch.tensor([rows[index].input_ids])
        labels = torch.tensor([rows[index].labels])
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        total, count = total + nll.item(), count + int((labels[:, 1:] != -100).sum())
    first, last = records(tmp_path / "run", "eval")
    assert first == {"kind": "eval", "step": 0, "eval_loss": pytest.approx(total / count, rel=1e-5)}
    assert last["step"] == 1
    assert last["eval_loss"] != first["eval_loss"]


def test_evaluating_and_saving_change_nothing_of_the_training(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 6, "tiny": {"dropout": 0.3, "eval_rows": 5}}
    run(config(output="busy", eval_every=1, eval_at_start=True, save_every=1, **keys))
    run(config(output="calm", eval_at_end=False, **keys))
    assert records(tmp_path / "busy", "train") == records(tmp_path / "calm", "train")


def test_parts_that_were_in_evaluation_mode_stay_in_it(config: Any) -> None:
    class Freezer:
        modes: tuple[bool, ...] = ()

        @hookimpl
        def on_event(self, event: Any) -> None:
            kind = type(event).__name__
            if kind == "RunStarted":
                event.job.model.module.model.layers[0].eval()
            if kind == "Stepped":
                layers = event.model.module.model.layers
                self.modes += (layers[0].training, layers[1].training)

    freezer = Freezer()
    run(config(max_steps=2, eval_every=1, tiny={"eval_rows": 2}, plugins=["freezer"]), freezer=freezer)
    assert freezer.modes == (False, True, False, True)


def test_dropout_is_active_in_training_and_differs_between_seeds(config: Any, tmp_path: Path) -> None:
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        run(config(output=name, max_steps=2, seed=seed, shuffle=False, tiny={"dropout": 0.5}))
    run(config(output="none", max_steps=2, shuffle=False))
    losses = [records(tmp_path / name)[0]["loss"] for name in ("a", "b", "c", "none")]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.parametrize(("precision", "near"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_trains_close_to_full(config: Any, tmp_path: Path, precision: str, near: float) -> None:
    keys = {"max_steps": 6, "tiny": {"rows": 4}, "adamw": {"learning_rate": 3e-3}}
    for name in ("fp32", precision):
        run(config(output=name, precision=name, **keys))
    full, half = (records(tmp_path / name, "train") for name in ("fp32", precision))
    assert full[-1]["loss"] < full[0]["loss"] - 0.2
    for a, b in zip(full, half, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=near)
        assert b["loss"] != a["loss"], "autocast acts"
    assert ("loss_scale" in half[0]) == (precision == "fp16")
    state = torch.load(checkpoint(tmp_path / precision, 6) / "optimizer.pt", weights_only=True)["state"]
    assert {part.dtype for moments in state.values() for part in moments.values()} == {torch.float32}


def test_clipping_bounds_the_gradient_and_reports_it_as_it_was(config: Any, tmp_path: Path) -> None:
    sgd_like = {"betas": [0.0, 0.0], "eps": 1e6, "learning_rate": 1.0}
    for name, norm in (("free", None), ("bound", 0.25)):
        run(config(output=name, max_steps=1, max_grad_norm=norm, shuffle=False, adamw=sgd_like))
    free, bound = (records(tmp_path / name)[0]["grad_norm"] for name in ("free", "bound"))
    assert free == pytest.approx(bound, rel=1e-6)
    assert free > 0.5
    from safetensors.torch import load_file

    start = dict(tiny_llama.build_model().named_parameters())
    moved = {}
    for name in ("free", "bound"):
        end = load_file(checkpoint(tmp_path / name, 1) / "model.safetensors")
        moved[name] = torch.cat([(end[key].double() - start[key].detach().double()).flatten() for key in end]).norm()
    assert moved["bound"] / moved["free"] == pytest.approx(0.25 / free, rel=0.05)


class Patcher:
    """Replaces a module that is called (`norm`), or one that is not."""

    def __init__(self, *, called: bool) -> None:
        self.called = called

    @hookimpl
    def patch_modules(self, model: Any, stage: str) -> list[ModulePatch]:
        if stage != "base":
            return []
        if not self.called:
            model.module.spare = torch.nn.Linear(2, 2)
        target = "model.norm" if self.called else "spare"
        return [ModulePatch(slot="norm", target=target, replace=lambda old: old.forward, reason="to be counted")]


def test_a_patch_that_never_acts_stops_the_run_after_its_first_step(config: Any, tmp_path: Path) -> None:
    assert run(config(max_steps=2, plugins=["p"]), p=Patcher(called=True)).step == 2
    observer = Observer()
    made = config(output="other", max_steps=5, plugins=["p", "o"])
    with pytest.raises(PatchError, match="spare"):
        run(made, p=Patcher(called=False), o=Quiet(observer))
    assert [step for kind, step in observer.seen if kind == "Stepped"] == [1]


class Quiet:
    """Passes on the names of events alone: the unused module has no gradient."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer

    @hookimpl
    def on_event(self, event: Any) -> None:
        self.observer.seen.append((type(event).__name__, getattr(event, "step", -1)))


def test_a_loss_over_a_whole_batch_refuses_accumulation(config: Any) -> None:
    class Whole:
        @hookimpl(wrapper=True)
        def build_loss(self) -> Any:
            loss = yield
            loss.scope = "batch"
            return loss

    assert run(config(max_steps=1, plugins=["whole"]), whole=Whole()).step == 1
    with pytest.raises(ConfigError, match="split into 2 micro-batches on each of 1 processes"):
        run(config(output="split", max_steps=1, accumulation=2, plugins=["whole"]), whole=Whole())


def test_figures_beside_the_loss_are_logged_over_their_counts(config: Any, tmp_path: Path) -> None:
    class Counting:
        @hookimpl(wrapper=True)
        def build_loss(self) -> Any:
            from pegbox.types import LossOutput, Term

            inner = yield

            class Loss:
                needs, scope, counts = inner.needs, inner.scope, inner.counts

                def __call__(self, batch: Any, outputs: Any) -> LossOutput:
                    best = Term(name="best_logp", total=outputs.logps_N.max(), count=1.0)
                    rows = Term(name="rows", total=torch.tensor(float(len(batch.rows))), count=1.0)
                    return LossOutput(terms=inner(batch, outputs).terms, metrics=(best, rows))

            return Loss()

    keys = {"micro_batch": 5, "accumulation": 2, "log_every": 2, "max_steps": 4, "tiny": {"eval_rows": 7}}
    run(config(plugins=["counting"], **keys), counting=Counting())
    first = records(tmp_path / "run", "train")[0]
    assert first["rows"] == 5.0
    assert -6 < first["best_logp"] < 0
    assert records(tmp_path / "run", "eval")[-1]["eval_rows"] == 3.5


def test_evaluation_without_held_out_rows_is_an_error_before_the_model_is_loaded(config: Any) -> None:
    class Watching:
        loaded = False

        @hookimpl(wrapper=True)
        def load_model(self) -> Any:
            self.loaded = True
            return (yield)

    for setting in ({"eval_every": 2}, {"eval_at_start": True}, {"epochs": 1, "evals_per_epoch": 1, "max_steps": None}):
        watching, keys = Watching(), {"max_steps": 2, **setting}
        with pytest.raises(ConfigError, match=r"trainer\.eval\w+ asks for evaluation, but there are no held-out rows"):
            run(config(output=f"run-{next(iter(setting))}", plugins=["watching"], **keys), watching=watching)
        assert not watching.loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 5, "epochs": 1.0}, "remove one of them"),
        ({"max_steps": 0}, "greater than or equal to 1"),
        ({"epochs": 0.0}, "greater than 0"),
        ({"precision": "fp8"}, "Input should be"),
        ({"max_grad_norm": 0.0}, "greater than 0"),
        ({"keep": 0}, "greater than or equal to 1"),
        ({"micro_batch": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainerConfig(**settings)


def test_metrics_are_json_without_a_terminal_and_lines_are_printed(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(max_steps=4, log_every=2, progress="lines", tiny={"eval_rows": 3}))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("tiny on cpu in fp32: 90,432 of 90,432 parameters trained, 4 steps")
    assert [line.split()[1] for line in printed[1:]] == ["2/4", "4/4", "4/4"]
    assert "tokens/s" in printed[1]
    assert "ETA" in printed[1]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert all(math.isfinite(value) for key, value in record.items() if key != "kind")


def test_a_bar_is_drawn_when_asked_for(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(config(max_steps=3, progress="bar"))
    assert "3/3" in capsys.readouterr().out


def test_a_frozen_second_model_is_placed_in_evaluation_mode_and_forwards(config: Any) -> None:
    from pegbox.types import ModelRequest

    class Reference:
        outputs: Any = None

        @hookimpl
        def on_event(self, ctx: Any, event: Any) -> None:
            if type(event).__name__ != "RunStarted":
                return
            self.model = ctx.open_model("reference", ModelRequest(name="tiny", format="transformers"))
            batch = next(iter(event.job.eval))[0]
            self.outputs = self.model.forward(batch, frozenset({"logps"}))
            self.expected = event.job.model.forward(batch, frozenset({"logps"}))

    reference = Reference()
    run(config(max_steps=1, tiny={"eval_rows": 3}, plugins=["reference"]), reference=reference)
    assert not reference.model.module.training
    assert not any(p.requires_grad for p in reference.model.module.parameters())
    assert not reference.outputs.logps_N.requires_grad
    torch.testing.assert_close(reference.outputs.logps_N, reference.expected.logps_N.detach())


def test_trained_parameters_alone_are_in_a_checkpoint(config: Any, tmp_path: Path) -> None:
    class Head:
        @hookimpl
        def apply_adapters(self, model: Any) -> Any:
            model.module.requires_grad_(False)
            model.module.lm_head.requires_grad_(True)
            return model

    run(config(max_steps=3, plugins=["head"]), head=Head())
    from safetensors.torch import load_file

    assert list(load_file(checkpoint(tmp_path / "run", 3) / "model.safetensors")) == ["lm_head.weight"]


def test_an_output_that_cannot_be_written_is_told_before_a_model_is_loaded(config: Any, tmp_path: Path) -> None:
    class Loads:
        @hookimpl
        def configure_model(self) -> Any:
            raise AssertionError("a model was asked for")

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output: \S+file/run cannot be written \(Not a directory\)"):
        run(config(output="file/run", plugins=["loads"]), loads=Loads())
    with pytest.raises(AssertionError, match="a model was asked for"):
        run(config(output="new/run", plugins=["loads"]), loads=Loads())
    assert not (tmp_path / "new").exists(), "nothing of the attempt stays"


@pytest.mark.parametrize("name", ["rewards/accuracies", "accuracy"])
def test_lines_of_preferences_say_how_many_answers_are_told_apart(name: str, capsys: pytest.CaptureFixture) -> None:
    from pegbox_trainer.progress import RunProgress

    figures = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_s": 10.0, "tokens_per_step": 5.0}
    with RunProgress("lines", 4, shown=True) as progress:
        progress.logged(2, {**figures, name: 0.75})
        progress.logged(4, figures)
    lines = capsys.readouterr().out.splitlines()
    assert "loss 0.5000  accuracy 0.75  grad norm" in lines[0]
    assert "accuracy" not in lines[1]


def test_the_line_of_an_evaluation_leaves_details_to_the_metrics_file(capsys: pytest.CaptureFixture) -> None:
    from pegbox_trainer.progress import RunProgress

    figures = {"eval_reward": 0.5, "eval_rewards/exact/mean": 0.5, "eval_completions/min_length": 3.0, "eval_loss": 0.1}
    with RunProgress("lines", 4, shown=True) as progress:
        progress.evaluated(4, figures)
    assert capsys.readouterr().out == "step 4/4  eval_reward 0.5000  eval_rewards/exact/mean 0.5000  eval_loss 0.1000\n"
