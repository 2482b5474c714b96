"""Patch records on real modules: what is replaced, what collides, what must act, and undo to byte-identical modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from patched_networks import IDS, Doubled, Network, Norm, Zero, apply, doubled_forward, model_of, patch, picture
from pegbox.errors import PatchError
from pegbox.patches import PatchLog
from pegbox.types import Model, ModulePatch, SeamChange

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return model_of(Network())


# ---- three kinds of replacement ----


def test_a_module_takes_the_place_of_the_old_one(model) -> None:
    plain, log = model.module(IDS), PatchLog()
    apply(log, model, patch("layers.*.norm"))
    assert [type(layer.norm) for layer in model.module.layers] == [Doubled] * 3
    assert [type(layer.norm.old) for layer in model.module.layers] == [Norm] * 3
    assert not torch.equal(model.module(IDS), plain)
    log.verify()


def test_a_callable_becomes_the_forward_of_the_instance_alone(model) -> None:
    plain, log = model.module(IDS), PatchLog()
    apply(log, model, patch("layers.1.norm", doubled_forward))
    assert "forward" in vars(model.module.layers[1].norm)
    assert "forward" not in vars(model.module.layers[0].norm)
    assert Norm.forward(model.module.layers[1].norm, torch.ones(4)).shape == (4,)
    assert not torch.equal(model.module(IDS), plain)
    log.verify()


def test_the_forward_of_a_patch_gives_what_its_module_would(model) -> None:
    one, two = PatchLog(), PatchLog()
    apply(one, model, patch("norm", doubled_forward))
    by_forward = model.module(IDS)
    one.undo()
    apply(two, model, patch("norm", Doubled))
    assert torch.equal(model.module(IDS), by_forward)


def seam(holder: Any, attribute: str, value: object, calls: Callable[[], int]) -> Callable[[Any], SeamChange]:
    return lambda old: SeamChange(
        seam="a library's seam", holder=holder or old, attribute=attribute, value=value, calls=calls
    )


class Registry:
    """A seam as libraries offer it: plain attribute, class attribute, or property."""

    inherited = "eager"

    def __init__(self) -> None:
        self.plain, self._chosen = "eager", "eager"

    @property
    def chosen(self) -> str:
        return self._chosen

    @chosen.setter
    def chosen(self, value: str) -> None:
        self._chosen = value


@pytest.mark.parametrize("attribute", ["plain", "inherited", "chosen"])
def test_a_seam_is_set_and_set_back_whatever_kind_of_attribute_it_is(model, attribute: str) -> None:
    registry, log = Registry(), PatchLog()
    before = dict(vars(registry))
    apply(log, model, patch("layers.0.self_attn", seam(registry, attribute, "fast", lambda: 0)))
    assert getattr(registry, attribute) == "fast"
    log.undo()
    assert getattr(registry, attribute) == "eager"
    assert vars(registry) == before
    assert Registry.inherited == "eager"


def test_a_seam_on_the_module_itself_leaves_nothing_behind(model) -> None:
    log, before = PatchLog(), picture(model.module)
    apply(log, model, patch("self_attn", seam(None, "implementation", "fast", lambda: 0)))
    assert [layer.self_attn.implementation for layer in model.module.layers] == ["fast"] * 3
    log.undo()
    assert picture(model.module) == before


def test_one_plugin_may_set_one_seam_for_many_modules(model) -> None:
    registry, log = Registry(), PatchLog()
    apply(log, model, patch("self_attn", seam(registry, "chosen", "fast", lambda: 0)))
    assert len(log.applied) == 3
    log.undo()
    assert registry.chosen == "eager"


# ---- targets ----


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("lm_head", ["lm_head"]),
        ("layers.0.norm", ["layers.0.norm"]),
        ("layers.*.norm", ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        ("norm", ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        ("*.norm", ["layers.0.norm", "layers.1.norm", "layers.2.norm"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1.**.q_proj", ["layers.1.self_attn.q_proj"]),
        (
            "layers.1.**",
            ["layers.1.self_attn", "layers.1.norm", "layers.1.self_attn.q_proj", "layers.1.self_attn.o_proj"],
        ),
        ("*_proj", [f"layers.{n}.self_attn.{p}_proj" for n in range(3) for p in "qo"]),
        ("self_attn.[qo]_proj", []),
        ("q_pro", []),
        ("_proj", []),
        ("layers.norm", []),
        ("layersX0.norm", []),
        ("layers.0.norm.weight", []),
        ("LM_HEAD", []),
    ],
)
def test_a_glob_matches_whole_parts_of_a_name_from_any_part_on(model, glob: str, names: list[str]) -> None:
    log = PatchLog()
    target = patch(glob, lambda old: old.forward.__get__(old))
    if not names:
        with pytest.raises(PatchError, match="matches no module"):
            apply(log, model, target)
    else:
        apply(log, model, target)
    assert sorted(applied.module_name for applied in log.applied) == sorted(names)


def test_a_predicate_sees_names_and_modules(model) -> None:
    log = PatchLog()
    apply(log, model, patch(lambda name, module: isinstance(module, Norm) and name.startswith("layers.2")))
    assert [applied.module_name for applied in log.applied] == ["layers.2.norm"]


def test_a_target_of_nothing_names_modules_that_are_near(model) -> None:
    with pytest.raises(PatchError) as error:
        apply(PatchLog(), model, patch("layers.*.nrom"))
    for part in ("the norm patch of plugin 'fast'", "'layers.*.nrom'", "of tiny", "norm"):
        assert part in str(error.value)


def test_a_patch_that_needs_a_trait_names_it_and_what_the_model_has() -> None:
    model, log = model_of(Network(), "causal", "tied_head"), PatchLog()
    with pytest.raises(PatchError) as error:
        apply(log, model, patch("norm", requires=frozenset({"causal", "moe"})))
    for part in ("'fast'", "needs a model with moe", "causal, tied_head", "Remove fast from plugins"):
        assert part in str(error.value)
    assert log.applied == []
    apply(log, model, patch("norm", requires=frozenset({"causal"})))


# ---- patches that change nothing ----


def test_a_patch_that_returns_the_module_itself_is_refused(model) -> None:
    with pytest.raises(PatchError, match=r"'fast' .*layers\.0\.norm"):
        apply(PatchLog(), model, patch("layers.0.norm", lambda old: old))


def test_the_whole_model_cannot_be_replaced_but_its_forward_can(model) -> None:
    with pytest.raises(PatchError, match="the whole model"):
        apply(PatchLog(), model, patch(lambda name, module: name == ""))
    log = PatchLog()
    apply(log, model, patch(lambda name, module: name == "", doubled_forward))
    model.module(IDS)
    log.verify()


def test_a_patched_module_that_is_never_called_stops_the_run(model) -> None:
    log = PatchLog()
    apply(log, model, patch("layers.*.norm"), patch("q_proj", slot="linear"))
    for layer in model.module.layers[1:]:
        layer.self_attn.forward = layer.self_attn.o_proj.forward
    model.module(IDS)
    with pytest.raises(PatchError) as error:
        log.verify()
    for part in (
        "2 of 6 patched modules",
        "linear of layers.1.self_attn.q_proj",
        "'fast'",
        "layers.2.self_attn.q_proj",
    ):
        assert part in str(error.value)
    assert "layers.0.self_attn" not in str(error.value)


def test_calls_before_the_patch_do_not_count(model) -> None:
    uses, log = [5], PatchLog()
    apply(log, model, patch("layers.0.self_attn", seam(Registry(), "chosen", "fast", lambda: uses[0])))
    with pytest.raises(PatchError, match="1 of 1"):
        log.verify()
    uses[0] += 1
    log.verify()


def test_counting_stops_when_the_patches_are_verified(model) -> None:
    log = PatchLog()
    apply(log, model, patch("layers.*.norm"), patch("q_proj", doubled_forward, slot="linear"))
    model.module(IDS)
    log.verify()
    assert [applied.calls() for applied in log.applied] == [1] * 6
    model.module(IDS)
    assert [applied.calls() for applied in log.applied] == [1] * 6
    assert all(not part._forward_pre_hooks for part in model.module.modules())
    log.verify()


def test_nothing_patched_is_nothing_to_verify() -> None:
    PatchLog().verify()


# ---- collisions ----


def collision(log: PatchLog, model: Model, *patches: ModulePatch, by: str = "second") -> str:
    with pytest.raises(PatchError, match="two patches") as error:
        apply(log, model, *patches, by=by)
    return str(error.value)


@pytest.mark.parametrize("first", [Doubled, doubled_forward])
@pytest.mark.parametrize("second", [Doubled, doubled_forward])
def test_one_slot_of_one_module_takes_one_patch(model, first, second) -> None:
    log = PatchLog()
    apply(log, model, patch("layers.*.norm", first), by="first")
    said = collision(log, model, patch("layers.1.norm", second))
    for part in (
        "the norm of layers.1.norm",
        "'first' (a faster norm)",
        "'second' (a faster norm)",
        "Remove first or second",
    ):
        assert part in said


def test_one_plugin_cannot_patch_one_slot_twice(model) -> None:
    assert "'fast'" in collision(PatchLog(), model, patch("norm"), patch("norm", after=("fast",)), by="fast")


def test_two_slots_of_one_module_do_not_collide(model) -> None:
    log, plain = PatchLog(), model.module(IDS)
    apply(log, model, patch("lm_head", doubled_forward, slot="head"), by="first")
    apply(log, model, patch("lm_head", doubled_forward, slot="recompute"), by="second")
    assert torch.equal(model.module(IDS), 4 * plain)
    log.undo()
    assert torch.equal(model.module(IDS), plain)


def test_a_patch_inside_a_module_that_another_plugin_replaced_is_refused(model) -> None:
    log = PatchLog()
    apply(log, model, patch("self_attn", slot="attention"), by="first")
    said = collision(log, model, patch("layers.0.self_attn.old.q_proj", slot="linear"))
    for part in ("'first'", "'second'", "layers.0.self_attn"):
        assert part in said


def test_replacing_a_module_around_another_plugins_patch_is_refused(model) -> None:
    log = PatchLog()
    apply(log, model, patch("layers.2.self_attn.q_proj", doubled_forward, slot="linear"), by="first")
    said = collision(log, model, patch("self_attn", Zero, slot="attention"))
    for part in ("'first'", "'second'", "layers.2.self_attn.q_proj", "layers.2.self_attn"):
        assert part in said


def test_replacing_a_module_around_ones_own_patch_is_refused(model) -> None:
    own = [patch("q_proj", slot="linear"), patch("self_attn", Zero, slot="attention")]
    assert "'fast'" in collision(PatchLog(), model, *own, by="fast")


def test_a_plugin_may_patch_inside_its_own_replacement(model) -> None:
    log = PatchLog()
    apply(log, model, patch("self_attn", slot="attention"), patch("self_attn.old.q_proj", slot="linear"))
    model.module(IDS)
    log.verify()


def test_a_new_forward_around_patched_modules_does_not_collide(model) -> None:
    log = PatchLog()
    apply(log, model, patch("q_proj", slot="linear"), by="first")
    apply(log, model, patch("layers.*", doubled_forward, slot="recompute"), by="second")
    model.module(IDS)
    log.verify()


@pytest.mark.parametrize(
    ("below", "above"),
    [
        (patch("norm"), patch("norm", after=("first",))),
        (patch("self_attn", slot="attention"), patch("self_attn.old.q_proj", slot="linear", after=("first",))),
        (patch("q_proj", slot="linear"), patch("self_attn", slot="attention", after=("first",))),
    ],
    ids=["same", "inside", "around"],
)
def test_a_patch_that_comes_after_another_one_builds_upon_it(model, below, above) -> None:
    log, plain, before = PatchLog(), model.module(IDS), picture(model.module)
    apply(log, model, below, by="first")
    apply(log, model, above, by="second")
    assert not torch.equal(model.module(IDS), plain)
    log.verify()
    log.undo()
    assert picture(model.module) == before


def test_after_names_a_plugin_and_does_not_admit_others(model) -> None:
    log = PatchLog()
    apply(log, model, patch("norm"), by="first")
    assert "'first'" in collision(log, model, patch("norm", after=("zeroth",)))


def test_two_models_in_one_process_do_not_collide() -> None:
    log, models = PatchLog(), [model_of(Network()) for _ in range(2)]
    for model in models:
        apply(log, model, patch("norm"), patch("layers.*", doubled_forward, slot="recompute"))
        model.module(IDS)
    log.verify()
    assert len(log.applied) == 12


def test_a_model_that_takes_the_memory_of_a_dropped_one_does_not_inherit_its_patches() -> None:
    log = PatchLog()
    for _ in range(50):
        apply(log, model_of(Network(layers=1)), patch("norm", doubled_forward))
    assert len(log.applied) == 50


# ---- adapters ----


class Wrapped(nn.Module):
    """What an adapter library does to a model: another root, and other names for the same modules."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": base})

    def forward(self, ids: Any) -> Any:
        return self.base_model["model"](ids)


def test_patches_collide_across_the_renaming_of_an_adapter(model) -> None:
    log = PatchLog()
    apply(log, model, patch("layers.*.norm"), patch("q_proj", doubled_forward, slot="linear"), by="first")
    wrapped = model_of(Wrapped(model.module))
    assert "'first'" in collision(log, wrapped, patch("layers.0.norm"))
    assert "'first'" in collision(log, wrapped, patch("layers.0.norm.old", slot="other"))
    assert "'first'" in collision(log, wrapped, patch("layers.0.self_attn", Zero, slot="attention"))
    apply(log, wrapped, patch("lm_head", slot="head"), by="second")
    wrapped.module(IDS)
    log.verify()


@pytest.mark.slow
def test_patches_collide_across_the_renaming_of_peft(model) -> None:
    peft = pytest.importorskip("peft")
    log = PatchLog()
    apply(log, model, patch("layers.*.norm"), by="first")
    adapted = model_of(peft.get_peft_model(model.module, peft.LoraConfig(target_modules=["q_proj"])))
    assert "'first'" in collision(log, adapted, patch("layers.0.norm"))
    apply(log, adapted, patch("q_proj.lora_A.default", doubled_forward, slot="adapter"), by="second")
    adapted.module.base_model.model(IDS)
    log.verify()


# ---- undo ----


def test_undo_gives_byte_identical_modules(model) -> None:
    registry, log, before = Registry(), PatchLog(), picture(model.module)
    plain = model.module(IDS)
    apply(
        log,
        model,
        patch("layers.*.norm"),
        patch("q_proj", doubled_forward, slot="linear"),
        patch("o_proj", Zero, slot="linear"),
        patch("layers.*", doubled_forward, slot="recompute"),
        patch("layers.0.self_attn", seam(registry, "chosen", "fast", lambda: 1), slot="attention"),
    )
    model.module(IDS)
    assert picture(model.module) != before
    log.undo()
    assert picture(model.module) == before
    assert torch.equal(model.module(IDS), plain)
    assert log.applied == []
    log.undo()


def test_undo_brings_back_a_forward_that_the_instance_had(model) -> None:
    log, norm = PatchLog(), model.module.layers[0].norm
    norm.forward = own = doubled_forward(norm)
    apply(log, model, patch("layers.0.norm", doubled_forward))
    log.undo()
    assert vars(norm)["forward"] is own


def test_after_undo_the_same_patches_apply_again(model) -> None:
    log = PatchLog()
    for _ in range(2):
        apply(log, model, patch("norm"))
        model.module(IDS)
        log.verify()
        log.undo()


def test_training_through_patches_reaches_the_original_parameters(model) -> None:
    log, norm = PatchLog(), model.module.layers[0].norm
    apply(log, model, patch("norm"))
    model.module(IDS).sum().backward()
    log.undo()
    assert model.module.layers[0].norm is norm
    assert norm.weight.grad.abs().sum() > 0


# ---- the summary ----


def test_the_summary_groups_modules_by_plugin_slot_and_reason(model) -> None:
    log = PatchLog()
    apply(log, model, patch("norm"), patch("lm_head", doubled_forward, slot="head", source="a paper"), by="first")
    assert log.summary() == [
        {
            "plugin": "first",
            "slot": "norm",
            "kind": "module",
            "reason": "a faster norm",
            "source": "",
            "modules": ["layers.0.norm", "layers.1.norm", "layers.2.norm"],
        },
        {
            "plugin": "first",
            "slot": "head",
            "kind": "forward",
            "reason": "a faster head",
            "source": "a paper",
            "modules": ["lm_head"],
        },
    ]
