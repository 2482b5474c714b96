"""Recomputing and offload change memory and nothing else: losses and gradients are equal to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model
from pegbox_activations.offload import HostCopy, Offload
from pegbox_activations.patching import layer_names

LAYERS = 4


def model_of(**changes: Any) -> Model:
    return tiny_model(num_hidden_layers=LAYERS, **changes)


def patched(model: Model, *plugins: str, **settings: Any) -> tuple[Model, PatchLog]:
    ctx = compose({"model": {"name": "tiny"}, "plugins": [*plugins, "activations"], "activations": settings})
    if plugins:
        model = ctx.call(hooks.apply_adapters, ctx, model)
    log = PatchLog()
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    return model, log


def step(model: Model) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(11)
    logps = model.compute(model.module, tiny_batches()[0], frozenset({"logps"})).logps_N
    loss = -logps.mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    return loss.item(), gradients


@contextmanager
def kept_bytes(model: Model) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps of a forward beyond the model's own tensors, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in (*model.module.parameters(), *model.module.buffers())}
    seen: dict[int, int] = {}
    total = {"bytes": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        total["bytes"] = sum(seen.values())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def calls_of(model: Model, end: str) -> list[int]:
    """Counts calls of modules whose name ends so; recomputing reaches the parts of a patched module."""
    count = [0]
    for name, module in model.module.named_modules():
        if name.endswith(end):
            module.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return count


SETTINGS = [
    {},
    {"policy": 2},
    {"modules": r".*\.mlp"},
    {"reentrant": True},
    {"offload": "cpu", "offload_min_bytes": 0},
    {"policy": "none", "offload": "cpu", "offload_min_bytes": 0},
    {"modules": r".*\.self_attn", "offload": "cpu", "offload_min_bytes": 64},
]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_are_those_without_to_the_bit(settings: dict[str, Any], dropout: float) -> None:
    expected = step(model_of(attention_dropout=dropout))
    model, log = patched(model_of(attention_dropout=dropout), **settings)
    loss, gradients = step(model)
    assert loss == expected[0]
    assert gradients.keys() == expected[1].keys()
    assert all(torch.equal(gradients[name], tensor) for name, tensor in expected[1].items())
    log.verify()


@pytest.mark.parametrize("settings", [{}, {"reentrant": True}, {"offload": "cpu", "offload_min_bytes": 0}])
def test_under_an_adapter_all_of_it_still_gets_its_gradient(settings: dict[str, Any]) -> None:
    plain = compose({"model": {"name": "tiny"}, "plugins": ["lora"]})
    expected = step(plain.call(hooks.apply_adapters, plain, model_of()))
    model, _ = patched(model_of(), "lora", **settings)
    loss, gradients = step(model)
    assert loss == expected[0]
    assert set(gradients) == {name for name, p in model.module.named_parameters() if p.requires_grad}
    assert all(torch.equal(gradients[name], tensor) for name, tensor in expected[1].items())


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ({}, LAYERS),
        ({"policy": 2}, 2),
        ({"policy": 3}, 3),
        ({"modules": r".*\.1\.mlp"}, 1),
        ({"reentrant": True}, LAYERS),
    ],
)
def test_the_backward_calls_what_is_recomputed_once_more(settings: dict[str, Any], again: int) -> None:
    model, _ = patched(model_of(), **settings)
    calls = calls_of(model, "mlp.up_proj")
    step(model)
    assert calls[0] == LAYERS + again


def test_less_is_kept_the_more_is_recomputed() -> None:
    kept = []
    for settings in (None, {"policy": 2}, {}):
        model = model_of() if settings is None else patched(model_of(), **settings)[0]
        with kept_bytes(model) as total:
            model.module.model(tiny_batches()[0].input_ids_BT, use_cache=False)
        kept.append(total["bytes"])
    plain, half, full = kept
    assert full < half
    assert full < 0.25 * plain


def test_offload_moves_the_inputs_of_layers_and_no_parameter() -> None:
    moved: list[torch.Tensor] = []

    class Spy(HostCopy):
        def __init__(self, tensor: torch.Tensor, *rest: Any) -> None:
            moved.append(tensor)
            super().__init__(tensor, *rest)

    import pegbox_activations.offload as module

    original, module.HostCopy = module.HostCopy, Spy
    try:
        model, _ = patched(model_of(), offload="cpu", offload_min_bytes=0)
        step(model)
    finally:
        module.HostCopy = original
    batch = tiny_batches()[0].input_ids_BT
    hidden = [tensor for tensor in moved if tensor.shape == (*batch.shape, 64)]
    assert len(hidden) == LAYERS
    assert not any(
        tensor.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
        for tensor in moved
        for p in model.module.parameters()
    )


def test_small_tensors_stay() -> None:
    offload = Offload(min_bytes=1 << 20)
    layer = torch.nn.Linear(8, 8)
    with offload.of(layer):
        layer(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert offload.moved_bytes == 0


def test_evaluation_recomputes_nothing() -> None:
    model, _ = patched(model_of())
    calls = calls_of(model, "mlp.up_proj")
    model.module.eval()
    model.compute(model.module, tiny_batches()[0], frozenset({"logps"}))
    assert calls[0] == LAYERS


def test_layers_are_the_largest_list_of_modules() -> None:
    network = torch.nn.ModuleDict(
        {
            "tower": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(9)),
            "blocks": torch.nn.ModuleList(
                torch.nn.ModuleDict({"experts": torch.nn.ModuleList([torch.nn.Linear(20, 20)])}) for _ in range(2)
            ),
        }
    )
    assert layer_names(network) == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": 0}, "at least 1"),
        ({"policy": "none"}, "nothing would be done"),
        ({"policy": "none", "offload": "cpu", "reentrant": True}, "remove reentrant"),
        ({"policy": 2, "modules": "x"}, "keep one of them"),
        ({"modules": "("}, "no regular expression"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "tiny"}, "plugins": ["activations"], "activations": settings})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"policy": 5}, "has 4 that are seen"),
        ({"modules": "mlp"}, "matches nothing"),
        ({"modules": r".*layers\.0.*"}, "lies in"),
    ],
)
def test_a_choice_that_the_model_cannot_meet_is_an_error(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        patched(model_of(), **settings)


def test_only_the_policy_is_patched() -> None:
    from dataclasses import replace

    model = replace(model_of(), role="reference")
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["activations"]})
    assert ctx.each(hooks.patch_modules, ctx, model, "recompute") == [("activations", [])]


def test_a_tensor_that_several_operators_save_is_moved_once() -> None:
    offload = Offload(min_bytes=0)
    query, key = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False)
    both = torch.nn.ModuleList([query, key])
    inputs = torch.randn(4, 8, requires_grad=True)
    with offload.of(both):
        hidden = inputs * 2.0
        outputs = query(hidden).sum() + key(hidden).sum() + key(hidden.mul(1.0)).sum()
    assert offload.moved_bytes == 2 * hidden.numel() * 4
    outputs.backward()
    gradient, inputs.grad = inputs.grad, None
    weight = query.weight.grad.clone()
    (query(inputs * 2.0).sum() + 2 * key(inputs * 2.0).sum()).backward()
    torch.testing.assert_close(gradient, inputs.grad)
    torch.testing.assert_close(weight, query.weight.grad / 2)


def test_a_tensor_changed_in_place_is_moved_anew() -> None:
    offload = Offload(min_bytes=0)
    layer = torch.nn.Linear(8, 8)
    with offload.of(layer):
        hidden = torch.ones(4, 8)
        first = layer(hidden)
        hidden.mul_(3.0)
        second = layer(hidden)
    (first.sum() + second.sum()).backward()
    assert torch.equal(layer.weight.grad, torch.full((8, 8), 16.0))
