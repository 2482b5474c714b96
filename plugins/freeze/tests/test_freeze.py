"""What is frozen keeps its bits, what is trained moves as in plain torch, and what would do nothing is an error."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pegbox.errors import ConfigError, PegboxError, RunError, UserError
from pegbox.events import GradientsReady, RunStarted, Stepped
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_model
from pegbox.types import Model
from torch import nn

Train = Callable[..., Model]


def moved(model: Model, **changes: Any) -> dict[str, torch.Tensor]:
    """Parameters that differ from their beginning, with a mask of the rows that do."""
    before = dict(tiny_model(**changes).module.named_parameters())
    after = {name: p.detach() for name, p in model.module.named_parameters()}
    return {name: after[name] != before[name] for name in after if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ({"train": [r"layers\.1\."]}, lambda name: "layers.1." in name),
        ({"freeze": [r"layers\.0\.", "embed_tokens"]}, lambda n: "layers.0." not in n and "embed_tokens" not in n),
        ({"train": ["mlp"], "freeze": [r"down_proj"]}, lambda n: "mlp" in n and "down_proj" not in n),
    ],
)
def test_exactly_the_chosen_parameters_move(freeze: dict, trained: Callable[[str], bool], train: Train) -> None:
    model = train(freeze)
    assert set(moved(model)) == {name for name, _ in model.module.named_parameters() if trained(name)}


class Recorder:
    """Keeps the gradients of each step as the optimizer gets them."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    @hookimpl
    def on_event(self, event: Any) -> None:
        if isinstance(event, GradientsReady):
            named = event.model.module.named_parameters()
            self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def by_hand(steps: list[dict[str, torch.Tensor]], rows: list[int] | None = None) -> dict[str, torch.Tensor]:
    """AdamW of plain torch over the trained parameters alone (of the embeddings: the rows), with the same gradients."""
    parameters = dict(tiny_model().module.named_parameters())
    table = "model.embed_tokens.weight"
    own = {name: parameters[name].detach().clone() for name in steps[0]}
    if rows is not None:
        own[table] = own[table][rows]
    decays = [name for name in own if own[name].ndim > 1 and (rows is None or name != table)]
    rest = [name for name in own if name not in decays]
    leaves = {name: nn.Parameter(tensor) for name, tensor in own.items()}
    groups = [{"params": [leaves[n] for n in decays], "weight_decay": 0.1}, {"params": [leaves[n] for n in rest]}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, weight_decay=0.0)
    for gradients in steps:
        for name, leaf in leaves.items():
            leaf.grad = gradients[name][rows] if rows is not None and name == table else gradients[name]
        optimizer.step()
    return {name: leaf.detach() for name, leaf in leaves.items()}


def test_trained_parameters_move_as_in_plain_torch(train: Train) -> None:
    recorder = Recorder()
    model = train({"train": ["mlp", r"\.norm\."]}, instances={"recorder": recorder}, trainer={"max_grad_norm": None})
    after = dict(model.module.named_parameters())
    for name, tensor in by_hand(recorder.steps).items():
        torch.testing.assert_close(after[name].detach(), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("others", [{}, {"train": ["mlp"]}])
def test_chosen_rows_move_as_if_they_were_the_whole_parameter(others: dict, train: Train) -> None:
    recorder, rows = Recorder(), [97, 98, 258]
    freeze = {"rows": {"embed_tokens": rows}, **others}
    model = train(freeze, instances={"recorder": recorder}, trainer={"max_grad_norm": None})
    changed = moved(model)
    assert changed["model.embed_tokens.weight"].any(1).nonzero().flatten().tolist() == [97, 98]
    assert all(not others or "mlp" in name for name in set(changed) - {"model.embed_tokens.weight"})
    after = dict(model.module.named_parameters())
    for name, tensor in by_hand(recorder.steps, rows).items():
        found = after[name].detach()
        found = found[rows] if name == "model.embed_tokens.weight" else found
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_rows_of_a_tied_table_move_alone(train: Train) -> None:
    model = train({"rows": {"lm_head": [97, "word"]}}, changes={"tie_word_embeddings": True})
    changed = moved(model, tie_word_embeddings=True)
    assert list(changed) == ["model.embed_tokens.weight"]
    assert changed["model.embed_tokens.weight"].any(1).nonzero().flatten().tolist() == [7, 97]


class Shrink:
    """Moves every row, as an optimizer might whose gradient is zero."""

    @hookimpl
    def on_event(self, event: Any) -> None:
        if isinstance(event, Stepped):
            with torch.no_grad():
                event.model.module.get_input_embeddings().weight.mul_(0.999)


class Replace:
    """Puts another parameter in the place of the embeddings, as a sharded placement does."""

    @hookimpl(wrapper=True)
    def place_model(self) -> Any:
        model = yield
        table = model.module.get_input_embeddings()
        table.weight = nn.Parameter(table.weight.detach().clone())
        return model


def test_rows_that_move_by_mistake_stop_the_run(train: Train) -> None:
    with pytest.raises(RunError, match=r"freeze\.rows does not name have changed"):
        train({"rows": {"embed_tokens": [97]}}, instances={"shrink": Shrink()})


def test_a_replaced_parameter_stops_the_run(train: Train) -> None:
    with pytest.raises(RunError, match="was replaced after the model was loaded"):
        train({"rows": {"embed_tokens": [97]}}, instances={"replace": Replace()})


def test_the_count_of_trained_parameters_is_shown(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="pegbox")
    train({"train": [r"model\.norm\.weight"]}, steps=1)
    assert "freeze: 64 of 107,328 parameters are trained, in 1 of 21 tensors" in caplog.text


class Adapter:
    """An owner of `apply_adapters`."""

    @hookimpl
    def apply_adapters(self, model: Model) -> Model:
        return model


def test_an_adapter_beside_it_is_an_error(train: Train) -> None:
    with pytest.raises(ConfigError, match="the plugins freeze and adapter are both listed"):
        train({"train": ["mlp"]}, instances={"adapter": Adapter()})


@pytest.mark.parametrize(
    ("freeze", "says", "why"),
    [
        ({"train": ["mlpp"]}, r"freeze\.train: 'mlpp' matches no parameter of tiny", "Did you mean 'mlp'"),
        ({"train": ["mlp", r"layers\.7\."]}, r"matches no parameter", "no effect"),
        ({"freeze": ["embed_token$"]}, r"freeze\.freeze: 'embed_token\$' matches no", "Did you mean 'embed_tokens'"),
        ({"train": ["mlp"], "freeze": ["self_attn"]}, "freezes nothing that freeze.train lets train", ""),
        ({"freeze": ["weight"]}, "freeze leaves nothing to train of the 21 parameters", ""),
        ({"rows": {"embed": [300]}}, "names the token 300, but there are 260 rows", ""),
        ({"rows": {"embed": ["wrod"]}}, "names 'wrod', which is 1 tokens", "Did you mean 'word'"),
        ({"rows": {r"layers\.0\.mlp\.up": [3]}}, "which is no table of tokens", ""),
        ({"rows": {"embed": [3], "embed_tokens": [4]}}, "both match model.embed_tokens.weight", ""),
        ({"rows": {"embed": [3]}, "freeze": ["embed"]}, r"freeze\.freeze 'embed' freezes it", ""),
    ],
)
def test_what_would_have_no_effect_is_an_error(freeze: dict, says: str, why: str, train: Train) -> None:
    with pytest.raises(UserError, match=says) as raised:
        train(freeze)
    assert why in raised.value.why


@pytest.mark.parametrize(
    ("freeze", "says"),
    [
        ({}, "nothing would be frozen"),
        ({"train": ["(mlp"]}, "is no regular expression"),
        ({"rows": {"embed": []}}, "lists no token"),
        ({"rows": {"embed": [3, 3]}}, "names a token twice"),
        ({"trian": ["mlp"]}, "Did you mean 'train'"),
    ],
)
def test_settings_that_say_nothing_are_refused_before_anything_is_loaded(freeze: dict, says: str) -> None:
    with pytest.raises(PegboxError, match=says):
        compose({"model": {"name": "x"}, "plugins": ["freeze"], "freeze": freeze})


def test_second_models_are_left_alone(train: Train) -> None:
    """A frozen second model is loaded through the same hook; what the policy trains says nothing about it."""
    from dataclasses import replace

    from pegbox.types import ModelRequest

    opened = {}

    class Second:
        @hookimpl
        def on_event(self, ctx: Any, event: Any) -> None:
            if isinstance(event, RunStarted):
                request = ModelRequest(name="tiny", format="transformers")
                opened["model"] = ctx.open_model("reference", replace(request))

    train({"train": ["mlp"]}, instances={"second": Second()}, steps=1)
    assert not any(p.requires_grad for p in opened["model"].module.parameters())
