"""The rules as tests: derive a class, name the plugin, inherit them.

`PluginConformance` is for every plugin. The others are for what it does: `LossConformance`, `PatchConformance`,
`ScoreConformance`, `CheckpointConformance`, `WrapperConformance`; and `CommandConformance` is for a distribution that
brings a command. One class may derive from several:

    class TestPacking(PluginConformance, WrapperConformance):
        plugin = "packing"
        config = {"length": 64}
        with_plugins = ("data",)

An inherited test cannot be overridden, unless it is marked `@pytest.mark.xfail(reason=...)` and says why the plugin may
depart from the rule. What a test works on (`model`, `batches`, `rollouts` ...) is a method, and may be overridden.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from pegbox import hooks
from pegbox.errors import PluginError
from pegbox.testing.fingerprint import foreign_classes_stay_as_they_are
from pegbox.testing.rules import activation, checkpoints, commands, losses, package, patching, scores, section, wrappers
from pegbox.testing.rules import hooks as hook_rules
from pegbox.testing.subject import Subject
from pegbox.testing.tiny import TinyExamples, plain_model, tiny_batches, tiny_model, tiny_rollouts

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutBatch
    from pegbox.rows import Batch
    from pegbox.types import Loss, Model

KIT = __name__


class Conformance:
    """What all conformance classes share.

    Attributes:
        plugin: the plugin's name.
        config: its section of the config, as a user would write it; needed if a setting has no default.
        with_plugins: plugins that must be listed before it.
        sections: the sections of those, by name.
        instances: ready plugins by name, for plugins that no distribution brings; `PluginConformance` needs one.
    """

    plugin: ClassVar[str] = ""
    config: ClassVar[Mapping[str, Any]] = {}
    with_plugins: ClassVar[Sequence[str]] = ()
    sections: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    instances: ClassVar[Mapping[str, object]] = {}

    def __init_subclass__(cls) -> None:
        """Refuse a class that overrides or removes an inherited test without saying why.

        Raises:
            TypeError: naming the test.
        """
        super().__init_subclass__()
        if cls.__module__ == KIT:
            return
        kit = (base for base in cls.__mro__ if base.__module__ == KIT)
        tests = {name: value for base in kit for name, value in vars(base).items() if name.startswith("test_")}
        for name, original in tests.items():
            now = inspect.getattr_static(cls, name)
            if now is not original and not _explains_itself(now):
                raise TypeError(
                    f"{cls.__name__}.{name} overrides a test of the conformance kit.\n"
                    "A rule that a plugin does not keep must be seen in the report of its tests.\n"
                    'Write @pytest.mark.xfail(reason="...") above it, or give it another name.'
                )

    def subject(self) -> Subject:
        """The plugin under test."""
        return Subject(self.plugin, self.config, tuple(self.with_plugins), self.sections, instances=self.instances)

    def activated(self) -> Subject:
        """The plugin under test; the test is skipped if it cannot be activated, which another one reports."""
        subject = self.subject()
        try:
            subject.activate()
        except PluginError:
            pytest.skip(f"'{self.plugin}' cannot be activated: see test_it_keeps_the_rules_of_hooks")
        return subject

    def context(self, folder: Path) -> Context:
        """A composed context for hooks that take one."""
        return self.subject().context(folder)

    def model(self) -> Model:
        """The model that patches are tried on: a tiny Llama; a new one each time, always the same."""
        return tiny_model()

    def batches(self) -> Sequence[Batch]:
        """Micro-batches that the model can compute and the loss can take."""
        return tiny_batches()


def _explains_itself(test: object) -> bool:
    marks = getattr(test, "pytestmark", [])
    return callable(test) and any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)


class PluginConformance(Conformance):
    """The rules for every plugin."""

    def test_it_has_one_name(self) -> None:
        package.has_one_name(self.subject())

    def test_it_requires_the_core(self) -> None:
        package.requires_the_core(self.subject())

    def test_it_is_typed(self) -> None:
        package.is_typed(self.subject())

    def test_it_has_a_readme(self) -> None:
        package.has_a_readme(self.subject())

    def test_it_keeps_the_rules_of_hooks(self) -> None:
        hook_rules.keeps_the_rules_of_hooks(self.subject())

    def test_it_is_imported_in_no_time(self) -> None:
        activation.is_imported_in_no_time(self.activated())

    def test_it_declares_without_heavy_imports(self) -> None:
        activation.declares_without_heavy_imports(self.activated())

    def test_it_declares_the_same_in_every_process(self) -> None:
        activation.declares_the_same_in_every_process(self.activated())

    def test_it_is_activated_anew_each_time(self) -> None:
        activation.is_activated_anew_each_time(self.activated())

    def test_it_leaves_other_packages_alone(self) -> None:
        activation.leaves_other_packages_alone(self.activated())

    def test_its_section_is_frozen(self) -> None:
        section.is_frozen(self.activated())

    def test_its_section_refuses_unknown_keys(self) -> None:
        section.refuses_unknown_keys(self.activated())

    def test_its_section_documents_every_setting(self) -> None:
        section.documents_every_setting(self.activated())

    def test_its_section_comes_back_from_json(self) -> None:
        section.comes_back_from_json(self.activated())

    def test_its_section_has_a_schema(self) -> None:
        section.has_a_schema(self.activated())


class LossConformance(Conformance):
    """The rules for an owner of `build_loss`.

    Attributes:
        rows_together: rows that belong together and are never split apart, such as 2 for pairs of chosen and rejected.
    """

    rows_together: ClassVar[int] = 1

    def loss_model(self) -> Model:
        """The model whose outputs the loss gets: a causal network of plain torch."""
        return plain_model()

    def loss(self, ctx: Context, model: Model) -> Loss:
        """The loss under test."""
        return ctx.call(hooks.build_loss, ctx, model)

    def _made(self, folder: Path) -> tuple[Loss, Model, Sequence[Batch]]:
        model, batches = self.loss_model(), self.batches()
        return self.loss(self.context(folder), model), model, batches

    def test_building_the_loss_leaves_other_packages_alone(self, tmp_path: Path) -> None:
        ctx, model = self.context(tmp_path), self.loss_model()
        with foreign_classes_stay_as_they_are(f"build_loss of '{self.plugin}'"):
            self.loss(ctx, model)

    def test_the_loss_declares_what_it_needs(self, tmp_path: Path) -> None:
        losses.declares_what_it_needs(self._made(tmp_path)[0])

    def test_the_loss_is_finite(self, tmp_path: Path) -> None:
        losses.is_finite(*self._made(tmp_path))

    def test_the_loss_is_differentiable(self, tmp_path: Path) -> None:
        losses.is_differentiable(*self._made(tmp_path))

    def test_counts_of_the_loss_depend_on_the_batch_alone(self, tmp_path: Path) -> None:
        losses.counts_depend_on_the_batch_alone(*self._made(tmp_path))

    def test_the_loss_does_not_depend_on_padding(self, tmp_path: Path) -> None:
        losses.does_not_depend_on_padding(*self._made(tmp_path))

    def test_the_loss_does_not_depend_on_the_split(self, tmp_path: Path) -> None:
        losses.does_not_depend_on_the_split(*self._made(tmp_path), self.rows_together)

    def test_the_loss_never_calls_the_model(self, tmp_path: Path) -> None:
        losses.never_calls_the_model(*self._made(tmp_path))


class PatchConformance(Conformance):
    """The rules for a plugin that answers `patch_attention` or `patch_modules`."""

    def _records(self, folder: Path) -> patching.Records:
        return patching.records_of(self.subject(), self.context(folder))

    def test_patches_are_declared(self, tmp_path: Path) -> None:
        patching.are_declared(self._records(tmp_path), self.model())

    def test_patches_act(self, tmp_path: Path) -> None:
        patching.act(self._records(tmp_path), self.model(), self.batches()[0])

    def test_patches_are_undone(self, tmp_path: Path) -> None:
        patching.are_undone(self._records(tmp_path), self.model(), self.batches()[0])

    def test_patches_leave_other_models_alone(self, tmp_path: Path) -> None:
        records = self._records(tmp_path)
        patching.leave_other_models_alone(records, self.model(), self.model(), self.batches()[0])

    def test_patches_keep_gradients(self, tmp_path: Path) -> None:
        patching.keep_gradients(self._records(tmp_path), self.model(), self.batches()[0])


class ScoreConformance(Conformance):
    """The rules for a plugin that answers `score_rollouts`; `named_by_config`: its config names the scores."""

    named_by_config = False

    def rollouts(self) -> RolloutBatch:
        """Rollouts to score; their columns must be those that the scorer reads."""
        return tiny_rollouts()

    def _scorer(self, folder: Path) -> scores.Scorer:
        subject, ctx = self.subject(), self.context(folder)
        return lambda rollouts: subject.answer(ctx, hooks.score_rollouts, ctx, rollouts) or ()

    def test_scores_have_one_value_for_each_rollout(self, tmp_path: Path) -> None:
        scores.have_one_value_for_each_rollout(self._scorer(tmp_path), self.rollouts())

    def test_scores_follow_the_order(self, tmp_path: Path) -> None:
        scores.follow_the_order(self._scorer(tmp_path), self.rollouts())

    def test_scores_have_names_of_their_own(self, tmp_path: Path) -> None:
        named = self.named_by_config
        scores.have_names_of_their_own(self._scorer(tmp_path), self.rollouts(), self.plugin, named_by_config=named)


class CheckpointConformance(Conformance):
    """The rules for an owner of `open_checkpoints`."""

    def _open(self, ctx: Context) -> Any:
        return ctx.call(hooks.open_checkpoints, ctx)

    def test_checkpoints_come_back_exactly(self, tmp_path: Path) -> None:
        checkpoints.come_back_exactly(lambda: self.context(tmp_path), self._open)

    def test_checkpoints_are_listed_oldest_first(self, tmp_path: Path) -> None:
        checkpoints.are_listed_oldest_first(lambda: self.context(tmp_path), self._open)

    def test_checkpoints_are_complete_or_absent(self, tmp_path: Path) -> None:
        checkpoints.are_complete_or_absent(lambda: self.context(tmp_path), self._open)

    def test_checkpoints_miss_no_state(self, tmp_path: Path) -> None:
        checkpoints.miss_no_state(lambda: self.context(tmp_path), self._open)


class WrapperConformance(Conformance):
    """The rules for a plugin that wraps the owner of a hook."""

    def result(self, hook: str) -> Any:
        """What the owner of a hook made: rows for `build_dataset`, a loss's owner is yours to name, else a model."""
        if hook == "build_dataset":
            return TinyExamples(["one", "two and three", "four", "five, six"])
        if hook in ("load_model", "apply_adapters", "place_model"):
            return self.model()
        pytest.fail(f"override `result` in {type(self).__name__}: what does the owner of {hook} make?")

    def arguments(self, ctx: Context) -> dict[str, Any]:
        """What hooks are called with, by name; the model and request are made only where torch is."""
        return {"ctx": ctx, "processor": ctx.processor, "split": "train"}

    def _wrappers(self, folder: Path) -> dict[str, wrappers.Wrapper]:
        return wrappers.wrappers_of(self.subject(), self.arguments(self.context(folder)))

    def test_wrappers_yield_once(self, tmp_path: Path) -> None:
        for hook, wrapper in self._wrappers(tmp_path).items():
            wrappers.yields_once(hook, wrapper, self.result(hook))

    def test_wrappers_pass_none_on(self, tmp_path: Path) -> None:
        for hook, wrapper in self._wrappers(tmp_path).items():
            wrappers.passes_none_on(hook, wrapper)

    def test_wrappers_let_errors_pass(self, tmp_path: Path) -> None:
        for hook, wrapper in self._wrappers(tmp_path).items():
            wrappers.lets_errors_pass(hook, wrapper)


class CommandConformance(Conformance):
    """The rules for a distribution that brings a command.

    Attributes:
        command: the command's name: an entry point in the group `pegbox.commands`.
    """

    command: ClassVar[str] = ""

    def _command(self) -> Subject:
        return Subject(self.command, group="pegbox.commands")

    def test_the_command_is_imported_without_heavy_libraries(self) -> None:
        commands.is_imported_without_heavy_libraries(self._command())

    def test_the_command_shows_its_help(self) -> None:
        commands.shows_its_help(self._command())

    def test_the_command_documents_every_parameter(self) -> None:
        commands.documents_every_parameter(self._command())

    def test_the_distribution_of_the_command_requires_the_core(self) -> None:
        package.requires_the_core(self._command())

    def test_the_distribution_of_the_command_is_typed(self) -> None:
        package.is_typed(self._command())

    def test_the_distribution_of_the_command_has_a_readme(self) -> None:
        package.has_a_readme(self._command())
