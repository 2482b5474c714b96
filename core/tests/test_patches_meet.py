"""Where patches meet: tied modules, modules inside each other, and one forward or seam under two slots."""

from __future__ import annotations

from functools import partial
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
from patched_networks import (
    IDS,
    Attention,
    Doubled,
    Network,
    Norm,
    Zero,
    apply,
    doubled_forward,
    model_of,
    patch,
    picture,
)
from pegbox.errors import PatchError
from pegbox.patches import PatchLog
from pegbox.types import Model, SeamChange

torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return model_of(Network())


def refused(log: PatchLog, model: Model, *patches: Any, by: str = "second") -> str:
    with pytest.raises(PatchError) as error:
        apply(log, model, *patches, by=by)
    return str(error.value)


# ---- tied modules ----


class Recurrent(nn.Module):
    """One block three times over, as in a Universal Transformer or ALBERT, and one norm in two places of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        block = Network(layers=1).layers[0]
        self.layers = nn.ModuleList([block] * 3)
        self.last_norm = block.norm

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.last_norm(x)


@pytest.fixture
def tied() -> Model:
    torch.manual_seed(0)
    return model_of(Recurrent())


@pytest.mark.parametrize("target", ["layers.0", "layers.2", "layers.*"])
def test_a_tied_module_is_replaced_at_all_its_names_whichever_of_them_matches(tied, target: str) -> None:
    log, before, plain = PatchLog(), picture(tied.module), tied.module(IDS)
    apply(log, tied, patch(target, slot="block"))
    assert [type(layer) for layer in tied.module.layers] == [Doubled] * 3
    assert len({id(layer) for layer in tied.module.layers}) == 1
    assert len(log.applied) == 1
    x = tied.module.embed(IDS)
    for layer in [tied.module.layers[0].old] * 3:
        x = 2 * layer(x)
    assert torch.equal(tied.module(IDS), tied.module.last_norm(x))
    log.verify()
    log.undo()
    assert picture(tied.module) == before
    assert torch.equal(tied.module(IDS), plain)


def test_a_module_tied_across_parents_is_replaced_in_both(tied) -> None:
    log, before = PatchLog(), picture(tied.module)
    apply(log, tied, patch("last_norm"))
    assert type(tied.module.last_norm) is Doubled
    assert tied.module.layers[1].norm is tied.module.last_norm
    log.undo()
    assert picture(tied.module) == before


def test_a_tied_module_inside_a_matched_one_is_replaced_before_it(tied) -> None:
    log, plain = PatchLog(), picture(tied.module)
    apply(log, tied, patch(lambda name, module: name == "last_norm" or name == "layers.1"))
    assert type(tied.module.layers[0]) is Doubled
    assert tied.module.layers[2].old.norm is tied.module.last_norm
    tied.module(IDS)
    log.verify()
    log.undo()
    assert picture(tied.module) == plain


def test_patches_of_one_slot_collide_under_any_name_of_a_tied_module(tied) -> None:
    log = PatchLog()
    apply(log, tied, patch("layers.0.norm", doubled_forward), by="first")
    said = refused(log, tied, patch("last_norm", doubled_forward))
    assert "'first'" in said
    assert "'second'" in said


# ---- a target that matches a module and what is inside it ----


def test_a_module_and_what_is_inside_it_are_replaced_from_the_inside_out(model) -> None:
    log, plain, before = PatchLog(), model.module(IDS), picture(model.module)
    apply(log, model, patch("layers.1.self_attn.**"), patch(lambda _, module: isinstance(module, Attention | Norm)))
    assert type(model.module.layers[1].self_attn.old.q_proj) is Doubled
    assert not torch.equal(model.module(IDS), plain)
    log.verify()
    log.undo()
    assert picture(model.module) == before

    one_record = patch("layers.0.**", slot="all")
    apply(log, model, one_record)
    norm, attention = model.module.layers[0].norm, model.module.layers[0].self_attn
    assert [type(part) for part in (norm, attention, attention.old.q_proj, attention.old.o_proj)] == [Doubled] * 4
    x = model.module.embed(IDS)
    halves = [projection.old for projection in (attention.old.q_proj, attention.old.o_proj)]
    by_hand = x + 2 * (2 * halves[1](2 * halves[0](2 * norm.old(x)))) * model.module.layers[0].scale
    assert torch.equal(model.module.layers[0](x), by_hand)
    log.undo()
    assert picture(model.module) == before


def test_a_target_whose_outer_module_drops_the_inner_one_is_an_error_that_names_both(model) -> None:
    before = picture(model.module)
    log = PatchLog()
    said = refused(log, model, patch("layers.1.self_attn.**", slot="x"), patch("layers.2.**", Zero, slot="y"))
    for part in (
        "the y patch of plugin 'second'",
        "layers.2.self_attn.q_proj and layers.2.self_attn around it",
        "target 'layers.2.**'",
        "Remove second from plugins",
    ):
        assert part in said
    log.undo()
    assert picture(model.module) == before


# ---- one module under two slots ----


def by_closure(old: Any) -> Any:
    found = old.forward
    return lambda x: 3 * found(x)


def by_partial(old: Any) -> Any:
    return partial(lambda found, x: 3 * found(x), old.forward)


def by_method(old: Any) -> Any:
    return MethodType(lambda self, x, found=old.forward: 3 * found(x), old)


WRAPS = [by_closure, by_partial, by_method]


def drops(old: Any) -> Any:
    return lambda x: 3 * x


def of_the_class(old: Any) -> Any:
    """As patches do that copy a class's forward: what stands on the instance is lost."""
    return MethodType(type(old).forward, old)


def reads_and_drops(old: Any) -> Any:
    known = callable(old.forward)
    return lambda x: 3 * x if known else x


@pytest.mark.parametrize("first", [Doubled, doubled_forward])
@pytest.mark.parametrize("second", WRAPS)
def test_a_forward_that_wraps_another_plugins_patch_is_no_collision(model, first, second) -> None:
    log, before, plain = PatchLog(), picture(model.module), model.module(IDS)
    apply(log, model, patch("lm_head", first, slot="head"), by="first")
    apply(log, model, patch("lm_head", second, slot="recompute"), by="second")
    assert torch.equal(model.module(IDS), 3 * (2 * plain))
    log.undo()
    assert picture(model.module) == before


@pytest.mark.parametrize(
    ("first", "second"),
    [(Doubled, drops), (Doubled, reads_and_drops), (Doubled, Zero)]
    + [(doubled_forward, drop) for drop in (drops, reads_and_drops, of_the_class, Zero)],
)
@pytest.mark.parametrize("after", [(), ("first",)])
def test_a_second_patch_that_drops_the_first_is_an_error_under_any_slot(model, first, second, after) -> None:
    log, before = PatchLog(), picture(model.module)
    apply(log, model, patch("lm_head", first, slot="head"), by="first")
    said = refused(log, model, patch("lm_head", second, slot="other", after=after))
    for part in ("two patches for the other of lm_head", "plugin 'first'", "plugin 'second'", "the head of lm_head"):
        assert part in said
    log.undo()
    assert picture(model.module) == before


def test_a_plugin_that_drops_its_own_patch_is_told_so(model) -> None:
    said = refused(PatchLog(), model, patch("norm", doubled_forward), patch("norm", drops, slot="other"), by="fast")
    assert "'fast' already patched the norm of layers.0.norm" in said


def test_the_third_patch_of_a_forward_must_hold_the_second(model) -> None:
    log = PatchLog()
    for slot, plugin in (("one", "first"), ("two", "second")):
        apply(log, model, patch("lm_head", doubled_forward, slot=slot), by=plugin)
    assert "'first'" in refused(log, model, patch("lm_head", of_the_class, slot="three"), by="third")


def test_a_forward_that_is_only_counted_may_be_replaced(model) -> None:
    log, plain = PatchLog(), model.module(IDS)
    apply(log, model, patch("self_attn", lambda old: old.forward, slot="attention"), by="first")
    assert {applied.kind for applied in log.applied} == {"calls"}
    apply(log, model, patch("self_attn", of_the_class, slot="rope"), by="second")
    assert torch.equal(model.module(IDS), plain)
    log.verify()


def test_a_replacement_that_keeps_what_another_plugin_patched_inside_is_no_collision(model) -> None:
    log, plain, before = PatchLog(), model.module(IDS), picture(model.module)
    apply(log, model, patch("q_proj", doubled_forward, slot="linear"), by="first")
    apply(log, model, patch("self_attn", slot="attention"), by="second")
    assert not torch.equal(model.module(IDS), plain)
    log.verify()
    log.undo()
    assert picture(model.module) == before


# ---- seams ----


def seam(holder: Any, value: str) -> Any:
    return lambda old: SeamChange(seam="a seam", holder=holder, attribute="chosen", value=value, calls=lambda: 0)


def test_two_plugins_that_set_one_seam_collide_on_any_modules_and_slots(model) -> None:
    library, log = SimpleNamespace(chosen="eager"), PatchLog()
    apply(log, model, patch("layers.0.self_attn", seam(library, "fast"), slot="attention"), by="first")
    said = refused(log, model, patch("layers.1.self_attn", seam(library, "faster"), slot="other"))
    assert "'first'" in said
    assert "'second'" in said
    apply(log, model, patch("layers.1.self_attn", seam(SimpleNamespace(chosen=""), "x"), slot="other"), by="second")
    apply(log, model, patch("layers.2.self_attn", seam(library, "y"), slot="other", after=("first",)), by="third")
    log.undo()
    assert library.chosen == "eager"


# ---- undo of one model ----


def test_the_patches_of_one_model_are_taken_back_and_those_of_another_stay(model) -> None:
    other, log = model_of(Network()), PatchLog()
    library, pictures = SimpleNamespace(chosen="eager"), [picture(one.module) for one in (model, other)]
    patches = [patch("norm"), patch("lm_head", doubled_forward), patch("norm.old", slot="x")]
    for one in (model, other):
        apply(log, one, *patches)
    apply(log, other, patch("layers.0.self_attn", seam(library, "fast"), slot="attention"), by="second")
    patched = model.module(IDS)
    log.undo(other)
    assert picture(other.module) == pictures[1]
    assert library.chosen == "eager"
    assert torch.equal(model.module(IDS), patched)
    assert len(log.applied) == 7
    log.verify()
    log.undo()
    assert picture(model.module) == pictures[0]
