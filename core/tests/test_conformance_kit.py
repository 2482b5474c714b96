"""The conformance kit: a sound plugin passes, and for each rule a broken one fails that rule alone, for its reason."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pegbox import hooks
from pegbox.events import RunFailed, Signal
from pegbox.hooks import hookimpl
from pegbox.rollouts import Score
from pegbox.rows import Extra
from pegbox.testing import (
    CheckpointConformance,
    CommandConformance,
    HookRecorder,
    LossConformance,
    PatchConformance,
    PluginConformance,
    RuleBroken,
    ScoreConformance,
    TinyExamples,
    WrapperConformance,
    pad_batch,
    run_cli,
    split_batch,
    tiny_processor,
    tiny_rollouts,
)
from pegbox.testing.tiny import tiny_batches as batches_of

if TYPE_CHECKING:
    from conftest import Site

BROKEN = Path(__file__).parent / "broken"
SOUND = BROKEN / "sound"

PACKAGES = {
    "distribution_of_another_name": ("test_it_has_one_name", "its distribution is 'pegbox-specimen'"),
    "no_requirement_on_the_core": ("test_it_requires_the_core", "does not require pegbox-core"),
    "requirement_without_an_end": ("test_it_requires_the_core", "'pegbox-core>=0.1', which has no upper bound"),
    "untyped": ("test_it_is_typed", "pegbox_sample has no file py.typed"),
    "readme_without_a_place_for_settings": ("test_it_has_a_readme", "no place for the settings between"),
    "table_that_leaves_a_setting_out": ("test_it_has_a_readme", "leaves out: limits"),
    "argument_with_a_default": ("test_it_keeps_the_rules_of_hooks", "argument 'event' has a default"),
    "order_of_its_own": ("test_it_keeps_the_rules_of_hooks", "uses tryfirst"),
    "no_hook": ("test_it_keeps_the_rules_of_hooks", "implements no hook"),
    "hook_without_a_marker": ("test_it_keeps_the_rules_of_hooks", "hook on_event: it is named like a hook"),
    "import_of_a_library": ("test_it_is_imported_in_no_time", "imports iniconfig"),
    "declaration_that_loads_numpy": ("test_it_declares_without_heavy_imports", "imports numpy"),
    "declaration_of_the_process": (
        "test_it_declares_the_same_in_every_process",
        "declares other items in another process",
    ),
    "state_in_the_class": ("test_it_is_activated_anew_each_time", "share seen"),
    "changed_class": ("test_it_leaves_other_packages_alone", "changed torch.nn.modules.dropout.Dropout.forward"),
    "section_that_can_change": ("test_its_section_is_frozen", "SampleConfig is not frozen"),
    "section_that_takes_anything": ("test_its_section_refuses_unknown_keys", "accepts the unknown key"),
    "inner_section_that_takes_anything": ("test_its_section_refuses_unknown_keys", "Limits, inside SampleConfig"),
    "setting_without_words": ("test_its_section_documents_every_setting", "no documentation: SampleConfig.rate"),
    "setting_that_comes_back_changed": ("test_its_section_comes_back_from_json", "comes back as"),
    "setting_without_a_number_in_json": ("test_its_section_comes_back_from_json", "cannot be written and read back"),
    "model_that_is_no_section": ("test_its_section_has_a_schema", "SampleConfig is no pegbox.section.Section"),
}


OF_ANOTHER_PROCESS = {
    "test_it_is_imported_in_no_time",
    "test_it_declares_without_heavy_imports",
    "test_it_declares_the_same_in_every_process",
    "test_it_leaves_other_packages_alone",
}
"""Tests that cost a second: they start a process, or look at every class of torch and transformers."""


def inherited(kit: type) -> set[str]:
    return {name for name in dir(kit) if name.startswith("test_")}


def failures(kit: type, names: Iterable[str], *arguments: object) -> dict[str, str]:
    """Those of the tests of a conformance class that fail, with what they say."""
    found = {}
    for name in sorted(names):
        try:
            getattr(kit(), name)(*arguments)
        except RuleBroken as broken:
            found[name] = str(broken)
        except pytest.skip.Exception as skipped:
            if "see test_it_keeps_the_rules_of_hooks" not in str(skipped):
                raise
    return found


@pytest.fixture
def sample(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], type]:
    """Install the sound sample with the files of a broken one laid over it; its conformance class."""
    import torch

    monkeypatch.setattr(torch.nn.Dropout, "forward", torch.nn.Dropout.forward)

    def install(broken: str | None) -> type:
        project = tmp_path / "project"
        shutil.copytree(SOUND, project)
        if broken:
            shutil.copytree(BROKEN / "packages" / broken, project, dirs_exist_ok=True)
        site.install_project(project)
        return type("TestSample", (PluginConformance,), {"plugin": "sample"})

    return install


def test_a_sound_plugin_keeps_every_rule(sample: Callable[..., type]) -> None:
    assert failures(sample(None), inherited(PluginConformance)) == {}


@pytest.mark.parametrize("broken", PACKAGES)
def test_a_broken_plugin_fails_the_rule_it_breaks_and_no_other(broken: str, sample: Callable[..., type]) -> None:
    test, reason = PACKAGES[broken]
    found = failures(sample(broken), inherited(PluginConformance) - OF_ANOTHER_PROCESS | {test})
    assert list(found) == [test], found
    assert reason in found[test]
    assert len(found[test].splitlines()) >= 3, "what, why, next"


@pytest.mark.slow
@pytest.mark.parametrize("broken", [name for name, (test, _) in PACKAGES.items() if test not in OF_ANOTHER_PROCESS])
def test_a_broken_plugin_fails_no_rule_about_processes(broken: str, sample: Callable[..., type]) -> None:
    assert failures(sample(broken), OF_ANOTHER_PROCESS) == {}


def test_every_rule_for_plugins_has_a_broken_sample_and_every_sample_is_used() -> None:
    assert {test for test, _ in PACKAGES.values()} == inherited(PluginConformance)
    assert set(PACKAGES) == {path.name for path in (BROKEN / "packages").iterdir()}


class OwnsLoss:
    def __init__(self, loss: Callable[[Any], Any]) -> None:
        self.loss = loss

    @hookimpl
    def build_loss(self, model: Any) -> Any:
        return self.loss(model)


class OwnsStore:
    def __init__(self, store: Callable[[Any], Any]) -> None:
        self.store = store

    @hookimpl
    def open_checkpoints(self, ctx: Any) -> Any:
        return self.store(ctx)


KINDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "losses": (LossConformance, OwnsLoss),
    "patches": (PatchConformance, lambda plugin: plugin()),
    "scores": (ScoreConformance, lambda plugin: plugin()),
    "stores": (CheckpointConformance, OwnsStore),
    "wrappers": (WrapperConformance, lambda plugin: plugin()),
}
SOUND_SAMPLES = [
    ("losses", "SoundLoss"),
    ("patches", "SoundPatches"),
    ("patches", "SoundModules"),
    ("scores", "SoundScores"),
    ("stores", "SoundStore"),
    ("wrappers", "SoundWrapper"),
]
SAMPLES = {
    ("losses", "NeedsAsList"): ("test_the_loss_declares_what_it_needs", "NeedsAsList.needs is"),
    ("losses", "UnknownScope"): ("test_the_loss_declares_what_it_needs", "scope is 'sequence'"),
    ("losses", "DividesByNothing"): ("test_the_loss_is_finite", "for a micro-batch with 0 trained tokens"),
    ("losses", "ChangedClass"): ("test_building_the_loss_leaves_other_packages_alone", "linear.Linear.forward"),
    ("losses", "WithoutGradient"): ("test_the_loss_is_differentiable", "'sample' has no gradient"),
    ("losses", "GradientOfNothing"): ("test_the_loss_is_differentiable", "parameters is zero"),
    ("losses", "CountOfTheOutputs"): ("test_counts_of_the_loss_depend_on_the_batch_alone", "the terms carry"),
    ("losses", "CountOnTheDevice"): ("test_counts_of_the_loss_depend_on_the_batch_alone", "is {'sample': tensor"),
    ("losses", "MeanOfThePaddedRows"): ("test_the_loss_does_not_depend_on_padding", "with 5 more columns"),
    ("losses", "MeanOfTheMicroBatch"): ("test_the_loss_does_not_depend_on_the_split", "as micro-batches of 1"),
    ("losses", "SecondForward"): ("test_the_loss_never_calls_the_model", "SecondForward ran embed"),
    ("patches", "NoPatch"): ("test_patches_are_declared", "there is no patch for tiny (traits: causal)"),
    ("patches", "NoReason"): ("test_patches_are_declared", "the slot norm gives no reason"),
    ("patches", "NeverCalled"): ("test_patches_act", "1 of 1 patched modules were never called"),
    ("patches", "ChangedWeights"): (
        "test_patches_are_undone",
        "differs in tensor model.layers.0.input_layernorm.weight",
    ),
    ("patches", "ChangedConfig"): ("test_patches_are_undone", "differs in config patched_norms"),
    ("patches", "ChangedClass"): ("test_patches_leave_other_models_alone", "LlamaRMSNorm.forward"),
    ("patches", "LostGradient"): ("test_patches_keep_gradients", "5 of "),
    ("scores", "NoScore"): ("test_scores_have_one_value_for_each_rollout", "there is no score"),
    ("scores", "ScorePerPrompt"): ("test_scores_have_one_value_for_each_rollout", "3 values for 6 rollouts"),
    ("scores", "NotANumber"): ("test_scores_have_one_value_for_each_rollout", "holds nan"),
    ("scores", "SilentWithoutRollouts"): ("test_scores_have_names_of_their_own", "when there is no completion"),
    ("scores", "SortedScores"): ("test_scores_follow_the_order", "when the prompts come in reverse order"),
    ("scores", "FreeName"): ("test_scores_have_names_of_their_own", "names a score 'length'"),
    ("scores", "NumberedName"): ("test_scores_have_names_of_their_own", "at the next call"),
    ("stores", "ForgetsTheSchedule"): ("test_checkpoints_come_back_exactly", "schedule last_epoch"),
    ("stores", "RoundsTheWeights"): ("test_checkpoints_come_back_exactly", "model embed.weight"),
    ("stores", "StatesAsText"): ("test_checkpoints_come_back_exactly", "registered state tensor"),
    ("stores", "SortedByName"): ("test_checkpoints_are_listed_oldest_first", "the list is [10, 2, 30]"),
    ("stores", "ListInMemory"): ("test_checkpoints_are_listed_oldest_first", "opened anew lists []"),
    ("stores", "WritesInPlace"): ("test_checkpoints_are_complete_or_absent", "the list is [1, 2]"),
    ("stores", "ToleratesStates"): ("test_checkpoints_miss_no_state", "a state that was not saved"),
    ("wrappers", "NoYield"): ("test_wrappers_yield_once", "returns without a yield"),
    ("wrappers", "TwoYields"): ("test_wrappers_yield_once", "yields a second time"),
    ("wrappers", "YieldsArguments"): ("test_wrappers_yield_once", "yields 'eval'"),
    ("wrappers", "ReturnsNothing"): ("test_wrappers_yield_once", "returns None"),
    ("wrappers", "FailsOnNone"): ("test_wrappers_pass_none_on", "fails on None: AttributeError"),
    ("wrappers", "SwallowsErrors"): ("test_wrappers_let_errors_pass", "swallows an error"),
}


def kit_for(kind: str, name: str) -> type:
    """The conformance class of a kind, for one of the samples of `broken/<kind>.py`."""
    kit, plugin = KINDS[kind]
    sample = runpy.run_path(str(BROKEN / f"{kind}.py"))[name]
    return type(f"Test{name}", (kit,), {"plugin": "sample", "instances": {"sample": plugin(sample)}})


def failures_of_kind(kind: str, name: str, folder: Path) -> dict[str, str]:
    found = {}
    for test in sorted(inherited(KINDS[kind][0])):
        inner = folder / test
        inner.mkdir()
        found.update(failures(kit_for(kind, name), [test], inner))
    return found


@pytest.mark.parametrize(("kind", "name"), SOUND_SAMPLES)
def test_a_sound_sample_keeps_every_rule_of_its_kind(kind: str, name: str, tmp_path: Path) -> None:
    assert failures_of_kind(kind, name, tmp_path) == {}


@pytest.mark.parametrize(("kind", "name"), SAMPLES)
def test_a_broken_sample_fails_the_rule_it_breaks_and_no_other(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn import Linear
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for cls in (LlamaRMSNorm, Linear):
        monkeypatch.setattr(cls, "forward", cls.forward)
    test, reason = SAMPLES[kind, name]
    found = failures_of_kind(kind, name, tmp_path)
    assert list(found) == [test], found
    assert reason in found[test]
    assert len(found[test].splitlines()) >= 3, "what, why, next"


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule_of_a_kind_has_a_broken_sample(kind: str) -> None:
    assert {test for (of, _), (test, _) in SAMPLES.items() if of == kind} == inherited(KINDS[kind][0])


MODULE = "pegbox_greet/__init__.py"
COMMANDS = {
    "test_the_command_is_imported_without_heavy_libraries": (
        (MODULE, "import typer", "import numpy\nimport typer"),
        "importing pegbox_greet imports numpy",
    ),
    "test_the_command_shows_its_help": (
        (MODULE, '    """Greet somebody."""\n', ""),
        "the command 'greet' has no docstring",
    ),
    "test_the_command_documents_every_parameter": (
        (MODULE, "typer.Argument(help=", "typer.Argument(metavar="),
        "the command 'greet' does not explain: name",
    ),
    "test_the_distribution_of_the_command_requires_the_core": (
        ("pyproject.toml", '"pegbox-core>=0.1,<0.2"', '"pegbox-corelle>=0.1,<0.2"'),
        "does not require pegbox-core",
    ),
    "test_the_distribution_of_the_command_is_typed": (
        ("pyproject.toml", 'packages = ["pegbox_greet"]', 'packages = ["pegbox_greet"]\nexclude = ["py.typed"]'),
        "no file py.typed",
    ),
    "test_the_distribution_of_the_command_has_a_readme": (
        ("pyproject.toml", 'readme = "README.md"', ""),
        "has no README that begins with a heading",
    ),
}


def install_command(site: Site, folder: Path, edit: tuple[str, str, str] | None) -> type:
    project = folder / "project"
    shutil.copytree(BROKEN / "command", project)
    if edit:
        name, old, new = edit
        text = (project / name).read_text()
        assert old in text
        (project / name).write_text(text.replace(old, new))
    site.install_project(project)
    return type("TestGreet", (CommandConformance,), {"command": "greet"})


def test_a_sound_command_keeps_every_rule(site: Site, tmp_path: Path) -> None:
    assert failures(install_command(site, tmp_path, None), inherited(CommandConformance)) == {}


@pytest.mark.parametrize("test", sorted(inherited(CommandConformance)))
def test_a_broken_command_fails_the_rule_it_breaks(test: str, site: Site, tmp_path: Path) -> None:
    edit, reason = COMMANDS[test]
    found = failures(install_command(site, tmp_path, edit), inherited(CommandConformance))
    assert list(found) == [test], found
    assert reason in found[test]


def test_a_command_whose_parameters_typer_cannot_read_has_no_help(site: Site, tmp_path: Path) -> None:
    edit = (MODULE, "Annotated[str,", "Annotated[set[str] | int,")
    found = failures(install_command(site, tmp_path, edit), ["test_the_command_shows_its_help"])
    assert "`pegbox greet --help` ends with code 1" in found["test_the_command_shows_its_help"]


def passes(self: object) -> None:
    """A test that tests nothing."""


@pytest.mark.skip(reason="later")
def skips(self: object) -> None:
    """A test that is left out."""


@pytest.mark.xfail
def fails(self: object) -> None:
    """A test that does not say why it may fail."""


@pytest.mark.xfail(reason="generated code has no types")
def explains(self: object) -> None:
    """A test that says why it may fail."""


def overriding(value: object) -> type:
    return type("TestMine", (PluginConformance,), {"plugin": "sample", "test_it_is_typed": value})


@pytest.mark.parametrize("value", [passes, None, skips, fails])
def test_an_inherited_test_cannot_be_silenced(value: object) -> None:
    with pytest.raises(TypeError, match=r"TestMine\.test_it_is_typed overrides a test of the conformance kit"):
        overriding(value)


def test_an_inherited_test_cannot_be_silenced_by_another_base_class() -> None:
    mixin = type("Mixin", (), {"test_it_is_typed": passes})
    with pytest.raises(TypeError, match="overrides a test"):
        type("TestMine", (mixin, PluginConformance), {})
    between = type("Between", (PluginConformance,), {"plugin": "sample"})
    with pytest.raises(TypeError, match="overrides a test"):
        type("TestMine", (between,), {"test_it_is_typed": None})


def test_an_inherited_test_may_be_expected_to_fail_for_a_reason() -> None:
    assert overriding(explains).test_it_is_typed is explains


def test_without_torch_a_sound_plugin_is_tested_and_what_computes_is_skipped(tmp_path: Path, site: Site) -> None:
    site.install_project(SOUND)
    (tmp_path / "test_sound.py").write_text(
        "from pegbox.testing import LossConformance, PluginConformance\n\n\n"
        "class TestSound(PluginConformance):\n    plugin = 'sample'\n\n\n"
        "class TestLoss(LossConformance):\n    plugin = 'sample'\n"
    )
    start = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); sys.modules.update(torch=None, transformers=None);"
        "import pytest; sys.exit(pytest.main(['-q', '-rs', '-p', 'no:cacheprovider', 'test_sound.py']))"
    )
    command = [sys.executable, "-c", start, json.dumps(sys.path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    wanted = (len(inherited(PluginConformance)), len(inherited(LossConformance)))
    assert "{} passed, {} skipped".format(*wanted) in done.stdout, done.stdout + done.stderr
    assert "which is not installed" in done.stdout


# ---- tools ----


class Rows:
    """Owns `build_dataset`, and has no held-out rows."""

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return TinyExamples(["a", "b", "c"]) if split == "train" else None


class Scorer:
    @hookimpl
    def score_rollouts(self, rollouts: Any) -> Any:
        if rollouts is None:
            raise ValueError("no rollouts")
        return [Score(name="scorer", values_R=(1.0,) * len(rollouts.rollouts))]

    @hookimpl
    def on_event(self, event: Any) -> Signal:
        return Signal.SAVE


def test_the_recorder_sees_owners_wrappers_collectors_and_observers_in_order(composed: Callable[..., Any]) -> None:
    wrapper = runpy.run_path(str(BROKEN / "wrappers.py"))["SoundWrapper"]()
    ctx = composed({"rows": Rows(), "scorer": Scorer(), "half": wrapper})
    kernel, rollouts, failed = ctx.kernel, tiny_rollouts(), RunFailed(error=ValueError("x"))
    untouched = dict(vars(kernel))
    with HookRecorder(kernel) as recorder:
        rows = ctx.call(hooks.build_dataset, ctx, tiny_processor(), "train")
        ctx.call(hooks.build_dataset, ctx, tiny_processor(), "eval")
        scores = ctx.each(hooks.score_rollouts, ctx, rollouts)
        ctx.notify(failed)
        with pytest.raises(ValueError, match="no rollouts"):
            ctx.each(hooks.score_rollouts, ctx, None)
    assert recorder.hooks() == ["build_dataset", "build_dataset", "score_rollouts", "on_event", "score_rollouts"]
    train, held_out = recorder.of("build_dataset")
    assert (train.plugins, train.answer, train.arguments["split"]) == (("rows", "half"), rows, "train")
    assert held_out.answer is None
    scored, refused = recorder.of("score_rollouts")
    assert (scored.plugins, scored.answer, scored.arguments["rollouts"]) == (("scorer",), scores, rollouts)
    assert str(refused.error) == "no rollouts"
    assert recorder.events() == [failed]
    assert recorder.of("on_event")[0].answer == Signal.SAVE
    ctx.notify(failed)
    assert len(recorder.calls) == 5, "nothing is recorded after the block"
    assert dict(vars(kernel)) == untouched


def test_the_command_line_runs_in_a_process_that_sees_the_same_packages(site: Site, tmp_path: Path) -> None:
    site.plugin("seen")
    done = run_cli("plugins", "--json", folder=tmp_path)
    assert done.returncode == 0
    assert "seen" in {plugin["name"] for plugin in json.loads(done.stdout)}
    wrong = run_cli("plan", "nothing.yaml", folder=tmp_path)
    assert wrong.returncode == 2
    assert "the config 'nothing.yaml' does not exist" in wrong.stderr


def test_pytest_loads_the_plugin_and_the_plugin_loads_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("def test_nothing(compose_config, tmp_path):\n    pass\n")
    start = (
        "import sys, pytest; assert pytest.main(['-q', '--collect-only', sys.argv[1]]) == 0;"
        "print(sorted(sys.modules.keys() & {'pegbox.testing.pytest_plugin', 'pydantic', 'torch', 'yaml', 'pluggy'}))"
    )
    command = [sys.executable, "-c", start, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['pegbox.testing.pytest_plugin', 'pluggy']"


def test_the_plain_forward_computes_the_loss_of_transformers(tiny_model: Any, tiny_batches: list[Any]) -> None:
    import torch

    for batch in tiny_batches:
        outputs = tiny_model.compute(tiny_model.module, batch, frozenset({"logps", "entropy", "hidden", "values"}))
        labels = torch.full_like(batch.targets_BT, -100)
        labels[:, 1:] = batch.targets_BT[:, :-1]
        wanted = tiny_model.module(batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels).loss
        torch.testing.assert_close(-outputs.logps_N.mean(), wanted)
        assert batch.trained_tokens == len(outputs.entropy_N) == int((labels != -100).sum())
        assert outputs.hidden_BTH.shape == (*outputs.values_BTC.shape[:2], 64)
        assert outputs.logits_NV is None, "only what was asked for"


def test_padding_and_splitting_keep_every_trained_token_and_every_extra_in_its_place() -> None:
    import torch

    batch, _ = batches_of()
    rows, width = batch.input_ids_BT.shape
    extra = {
        "document": Extra(value=torch.arange(rows), layout="document"),
        "token": Extra(value=torch.arange(rows * width * 2).reshape(rows, width, 2), layout="token"),
        "trained": Extra(value=batch.trained_N.clone(), layout="trained"),
        "global": Extra(value=torch.tensor(7.0), layout="global"),
    }
    batch = replace(batch, extra=extra)
    tokens = batch.targets_BT.flatten()[batch.trained_N]

    padded = pad_batch(batch, 3)
    assert padded.input_ids_BT.shape == padded.attention_mask_BT.shape == (rows, width + 3)
    assert torch.equal(padded.targets_BT.flatten()[padded.trained_N], tokens)
    assert torch.equal(padded.input_ids_BT.flatten()[padded.last_D], batch.input_ids_BT.flatten()[batch.last_D])
    assert padded.extra["token"].value.shape == (rows, width + 3, 2)
    assert torch.equal(padded.extra["token"].value[:, :width], extra["token"].value)

    parts = split_batch(batch)
    assert [part.rows for part in parts] == [(row,) for row in batch.rows]
    assert torch.equal(torch.cat([part.targets_BT.flatten()[part.trained_N] for part in parts]), tokens)
    for part in parts:
        assert part.document_N.tolist() == [0] * part.trained_tokens
        assert part.last_D.tolist() == [int(part.attention_mask_BT.sum()) - 1]
    joined_N = torch.cat([part.document_N + at for at, part in enumerate(parts)])
    assert torch.equal(joined_N, batch.document_N)
    for name in ("document", "token", "trained"):
        assert torch.equal(torch.cat([part.extra[name].value for part in parts]), extra[name].value), name
    assert all(part.extra["global"] is extra["global"] for part in parts)
    assert [len(part.rows) for part in split_batch(batch, 2)] == [2, 1]


def test_the_tokenizer_of_bytes_gives_any_text_back() -> None:
    tokenizer = tiny_processor().tokenizer
    text = "Grüße, 世界!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == f"<bos>{text}<eos>"
    assert tokenizer(text)["input_ids"] == ids
