"""The story of a run: hooks in their order, what each receives, and how a run ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError, PegboxError, RunError
from pegbox.events import Event, RunEnded, RunFailed
from pegbox.hooks import SPECS, hookimpl
from pegbox.run import execute
from pegbox.types import Checkpoint, ExportRequest, GroupOptions, Item, Job, Model, ModelOptions, ModelRequest, Outcome


class Module:
    """A network of three named parameters."""

    def __init__(self) -> None:
        self.parameters = {name: Parameter(name != "frozen") for name in ("up.weight", "up.bias", "frozen")}

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        return list(self.parameters.items())


@dataclasses.dataclass
class Parameter:
    requires_grad: bool


class Rows:
    def __init__(self, split: str) -> None:
        self.split, self.fingerprint = split, f"rows of {split}"

    def __len__(self) -> int:
        return 3


class Batches:
    total_steps = 7


class Runtime:
    rank, world_size = 0, 1

    def __init__(self, *others: str) -> None:
        self.others = others

    def gather_objects(self, value: object) -> list[object]:
        return [value, *self.others]

    def barrier(self) -> None:
        """One process waits for nobody."""


@dataclasses.dataclass
class Store:
    checkpoints: list[Checkpoint]

    def list(self) -> list[Checkpoint]:
        return self.checkpoints


class Whole:
    """Owns every hook of a run and writes down the calls; what it does can be changed by field."""

    def __init__(self, **changes: Any) -> None:
        self.calls: list[str] = []
        self.events: list[Event] = []
        self.job: Job | None = None
        self.exported: ExportRequest | None = None
        self.groups: Any = None
        self.reason = changes.pop("reason", "finished")
        self.fails = changes.pop("fails", "")
        self.splits = changes.pop("splits", ("train", "eval"))
        self.adapter = changes.pop("adapter", None)
        self.checkpoints = changes.pop("checkpoints", [])
        self.others = changes.pop("others", ())
        assert not changes

    def say(self, hook: str) -> None:
        self.calls.append(hook)
        if hook == self.fails:
            raise RunError(f"{hook} failed", "It was asked to.", "Nothing.")

    @hookimpl
    def register_items(self) -> list[Item]:
        formats = (("model_format", "transformers"), ("export_format", "transformers"), ("export_format", "peft"))
        return [Item(kind=kind, name=name, target=self) for kind, name in formats]

    @hookimpl
    def build_runtime(self, ctx: Context) -> Runtime:
        ctx.exit.callback(self.calls.append, "closed")
        self.say("build_runtime")
        return Runtime(*self.others)

    @hookimpl
    def load_processor(self, ctx: Context) -> object:
        self.say("load_processor")
        return Rows("train")

    @hookimpl
    def build_dataset(self, ctx: Context, processor: object, split: str) -> Rows | None:
        assert ctx.processor is processor
        self.say(f"build_dataset {split}")
        return Rows(split) if split in self.splits else None

    @hookimpl
    def configure_model(self) -> ModelOptions:
        self.say("configure_model")
        return ModelOptions(attention="sdpa")

    @hookimpl
    def load_model(self, request: ModelRequest) -> Model:
        assert (request.name, request.role, request.options.attention, request.meta) == (
            "some/model",
            "policy",
            "sdpa",
            False,
        )
        self.say("load_model")
        module: Any = Module()
        compute: Any = None
        return Model(module=module, name="m", base="m", format="transformers", compute=compute, adapter=self.adapter)

    @hookimpl
    def patch_attention(self, model: Model) -> list[object]:
        self.say("patch_attention")
        return []

    @hookimpl
    def patch_modules(self, stage: str) -> list[object]:
        self.say(f"patch_modules {stage}")
        return []

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        self.say("apply_adapters")
        return model

    @hookimpl
    def place_model(self, model: Model) -> Model:
        self.say("place_model")
        return model

    @hookimpl
    def build_loss(self, model: Model) -> object:
        self.say("build_loss")
        return "loss"

    @hookimpl
    def build_batches(self, dataset: Rows) -> Batches:
        self.say(f"build_batches {dataset.split}")
        return Batches()

    @hookimpl
    def configure_groups(self) -> list[GroupOptions]:
        self.say("configure_groups")
        return [GroupOptions(pattern="bias$", weight_decay=0.0)]

    @hookimpl
    def build_optimizer(self, ctx: Context, groups: object) -> object:
        assert ctx.total_steps == 7
        self.say("build_optimizer")
        self.groups = groups
        return "optimization"

    @hookimpl
    def open_checkpoints(self) -> Store:
        self.say("open_checkpoints")
        return Store(self.checkpoints)

    @hookimpl
    def run_training(self, ctx: Context, job: Job) -> Outcome:
        self.say("run_training")
        self.job = job
        return Outcome(reason=self.reason, step=7)

    @hookimpl
    def export_model(self, request: ExportRequest) -> Path:
        self.say("export_model")
        self.exported = request
        return request.folder

    @hookimpl
    def on_event(self, event: Event) -> None:
        self.events.append(event)
        self.calls.append(f"on_event {type(event).__name__}")


STORY = [
    "on_event RunBegins",
    "load_processor",
    "build_dataset train",
    "build_dataset eval",
    "build_runtime",
    "configure_model",
    "load_model",
    "patch_attention",
    "patch_modules base",
    "apply_adapters",
    "patch_modules adapted",
    "patch_modules recompute",
    "patch_modules compile",
    "place_model",
    "build_loss",
    "build_batches train",
    "build_batches eval",
    "configure_groups",
    "build_optimizer",
    "open_checkpoints",
    "run_training",
    "export_model",
    "on_event RunEnded",
    "closed",
]


@pytest.fixture
def begin(composed, tmp_path: Path):
    """Compose a run of one plugin that does everything."""

    def compose_whole(whole: Whole, **config: Any) -> Context:
        return composed({"whole": whole}, **{"output": str(tmp_path / "out"), **config})

    return compose_whole


def test_a_run_asks_the_hooks_in_their_order(begin) -> None:
    whole = Whole()
    outcome = execute(begin(whole))
    assert (outcome.reason, outcome.step) == ("finished", 7)
    assert whole.calls == STORY


def test_the_specifications_stand_in_the_order_of_a_run(begin) -> None:
    whole = Whole()
    execute(begin(whole))
    first_calls = [hook for hook in dict.fromkeys(call.split()[0] for call in whole.calls[1:]) if hook in SPECS]
    assert first_calls == [hook for hook in SPECS if hook in first_calls]


def test_the_job_holds_what_was_built(begin) -> None:
    whole = Whole()
    execute(begin(whole))
    job = whole.job
    assert (job.loss, job.optimization, job.resume) == ("loss", "optimization", None)
    assert isinstance(job.train, Batches)
    assert isinstance(job.eval, Batches)
    assert [(group.names, group.options.weight_decay) for group in whole.groups] == [
        (("up.weight",), None),
        (("up.bias",), 0.0),
    ]


def test_without_rows_for_evaluation_nothing_is_evaluated(begin) -> None:
    whole = Whole(splits=("train",))
    execute(begin(whole))
    assert whole.job.eval is None
    assert "build_batches eval" not in whole.calls


def test_without_rows_for_training_there_is_no_run(begin) -> None:
    whole = Whole(splits=())
    with pytest.raises(ConfigError, match="no training data") as error:
        execute(begin(whole))
    assert "Set whole.train" in error.value.next
    assert "load_model" not in whole.calls


@pytest.mark.parametrize(("adapter", "form"), [(None, "transformers"), ("peft", "peft")])
def test_what_was_trained_is_exported_in_its_own_format(begin, adapter, form) -> None:
    whole = Whole(adapter=adapter)
    ctx = begin(whole)
    execute(ctx)
    assert whole.exported == ExportRequest(folder=ctx.folder, format=form)


def test_an_interrupted_run_exports_nothing_and_says_so(begin) -> None:
    whole = Whole(reason="interrupted")
    assert execute(begin(whole)).reason == "interrupted"
    assert whole.calls[-3:] == ["run_training", "on_event RunEnded", "closed"]


@pytest.mark.parametrize("hook", ["build_runtime", "load_model", "run_training", "export_model"])
def test_observers_hear_of_a_failure_and_everything_opened_is_closed(begin, hook: str) -> None:
    whole = Whole(fails=hook)
    with pytest.raises(RunError, match=f"{hook} failed") as error:
        execute(begin(whole))
    assert whole.calls[-3:] == [hook, "on_event RunFailed", "closed"]
    (event,) = whole.events[1:]
    assert isinstance(event, RunFailed)
    assert event.error is error.value
    assert error.value.__notes__ == [f"in plugin 'whole' (object whole), hook {hook}"]


def test_an_ended_run_tells_its_outcome_and_folder(begin) -> None:
    whole = Whole()
    ctx = begin(whole)
    outcome = execute(ctx)
    assert whole.events[1:] == [RunEnded(outcome=outcome, folder=ctx.folder)]


def test_ranks_that_disagree_stop_before_a_model_is_loaded(begin) -> None:
    whole = Whole(others=("another digest",))
    with pytest.raises(RunError, match=r"ranks \[1\]"):
        execute(begin(whole))
    assert whole.calls == [*STORY[: STORY.index("build_runtime") + 1], "on_event RunFailed", "closed"]


def test_a_run_without_a_needed_owner_does_not_begin(composed, tmp_path) -> None:
    class Half:
        @hookimpl
        def build_runtime(self) -> object:
            raise AssertionError("the run began")

    with pytest.raises(PegboxError, match="no active plugin owns load_processor"):
        execute(composed({"half": Half()}, output=str(tmp_path / "out")))


# ---- the folder ----


def checkpoints(folder: Path, *steps: int) -> list[Checkpoint]:
    return [Checkpoint(step=step, path=folder / f"step-{step}") for step in steps]


def begun(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")


def test_a_run_overwrites_nothing_and_names_a_free_folder(begin, tmp_path) -> None:
    begun(tmp_path / "out")
    (tmp_path / "out-2").mkdir()
    whole = Whole()
    with pytest.raises(ConfigError, match="already holds a run") as error:
        execute(begin(whole))
    assert "resume=auto" in error.value.next
    assert f"output={tmp_path / 'out-3'}" in error.value.next
    assert whole.calls == ["on_event RunBegins", "on_event RunFailed"]


@pytest.mark.parametrize(("make", "part"), [("folder", "holds other files"), ("file", "is a file")])
def test_a_folder_of_something_else_is_refused_even_to_resume(begin, tmp_path, make: str, part: str) -> None:
    if make == "folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.tex").write_text("")
    else:
        (tmp_path / "out").write_text("")
    for resume in ({}, {"resume": "auto"}):
        with pytest.raises(ConfigError, match=part):
            execute(begin(Whole(), **resume))


def test_an_empty_folder_is_as_good_as_none(begin, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    assert execute(begin(Whole())).reason == "finished"


@pytest.mark.parametrize(("resume", "step"), [(None, None), ("auto", 20), ("step-10", 10)])
def test_a_run_resumes_where_it_is_asked_to(begin, tmp_path, resume, step) -> None:
    if resume:
        begun(tmp_path / "out")
    whole = Whole(checkpoints=checkpoints(tmp_path / "out", 10, 20))
    execute(begin(whole, resume=resume))
    assert (whole.job.resume and whole.job.resume.step) == step


def test_resuming_automatically_without_a_checkpoint_starts_from_the_beginning(begin, tmp_path) -> None:
    whole = Whole()
    execute(begin(whole, resume="auto"))
    assert whole.job.resume is None


def test_resuming_from_an_unknown_checkpoint_names_those_there_are(begin, tmp_path) -> None:
    begun(tmp_path / "out")
    whole = Whole(checkpoints=checkpoints(tmp_path / "out", 10, 20))
    with pytest.raises(ConfigError, match="no checkpoint 'step-15'") as error:
        execute(begin(whole, resume="step-15"))
    assert "step-10" in str(error.value)


def test_resuming_a_run_that_is_not_there_is_refused(begin) -> None:
    with pytest.raises(ConfigError, match=r"resume=step-10, but .*out holds no run"):
        execute(begin(Whole(), resume="step-10"))


# ---- groups ----


def test_options_that_reach_no_parameter_stop_the_run(begin) -> None:
    class Idle(Whole):
        @hookimpl
        def configure_groups(self) -> list[GroupOptions]:
            return [GroupOptions(pattern="embed", weight_decay=0.0)]

    with pytest.raises(PegboxError, match="'whole' gives options to parameters matching 'embed'"):
        execute(begin(Idle()))


def test_two_plugins_that_want_different_models_are_named(composed, tmp_path) -> None:
    class Other:
        @hookimpl
        def configure_model(self) -> ModelOptions:
            return ModelOptions(attention="eager", dtype="float32")

    ctx = composed({"whole": Whole(), "other": Other()}, output=str(tmp_path / "out"))
    with pytest.raises(
        PegboxError, match=r"'whole' and 'other' disagree on 'attention' of the model: 'sdpa' and 'eager'"
    ):
        execute(ctx)


def test_two_plugins_that_want_different_groups_are_named(composed, tmp_path) -> None:
    class Other:
        @hookimpl
        def configure_groups(self) -> list[GroupOptions]:
            return [GroupOptions(pattern="up", weight_decay=0.1), GroupOptions(pattern="weight", tag="matrix")]

    ctx = composed({"whole": Whole(), "other": Other()}, output=str(tmp_path / "out"))
    with pytest.raises(PegboxError, match=r"disagree on 'weight_decay' of parameter up\.bias: 0\.0 and 0\.1"):
        execute(ctx)


def test_the_hooks_of_the_story_are_all_there_is_besides_rollouts_and_declarations() -> None:
    told = {step.split()[0] for step in STORY} - {"closed"}
    declared = {name for name in SPECS if hooks.semantics(name) == "register"}
    assert set(SPECS) - told - declared == {"generate_rollouts", "score_rollouts", "sync_weights"}
