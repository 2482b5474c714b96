"""A compiled model computes what the plain one does, and layers share their graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.events import RunBegins, RunStarted
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model
from torch._dynamo.utils import counters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def patched(model: Model, *plugins: str, **settings: Any) -> tuple[Model, PatchLog]:
    ctx = compose({"model": {"name": "tiny"}, "plugins": [*plugins, "compile"], "compile": settings})
    if "lora" in plugins:
        model = ctx.call(hooks.apply_adapters, ctx, model)
    log = PatchLog()
    for stage in ("recompute", "compile"):
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
    return model, log


def step(model: Model, micro_batch: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logps = model.compute(model.module, tiny_batches()[micro_batch], frozenset({"logps"})).logps_N
    (-logps.mean()).backward()
    gradients = {name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None}
    model.module.zero_grad()
    return logps.detach(), gradients


def adapted() -> Model:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora"]})
    return ctx.call(hooks.apply_adapters, ctx, tiny_model())


@pytest.mark.parametrize("scope", ["layers", "model"])
@pytest.mark.parametrize("plugins", [(), ("activations",), ("lora", "activations")])
def test_logps_and_gradients_equal_those_of_the_plain_model(scope: str, plugins: tuple[str, ...]) -> None:
    expected = step(adapted() if "lora" in plugins else tiny_model())
    model, log = patched(tiny_model(), *plugins, scope=scope, backend="aot_eager")
    logps, gradients = step(model)
    torch.testing.assert_close(logps, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-6)
    log.verify()


@pytest.mark.slow
def test_inductor_equals_the_plain_model() -> None:
    expected = step(tiny_model())
    logps, gradients = step(patched(tiny_model())[0])
    torch.testing.assert_close(logps, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-3, atol=1e-5)


def test_layers_share_one_graph() -> None:
    model, _ = patched(tiny_model(num_hidden_layers=6), backend="aot_eager", fullgraph=True)
    step(model)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_third_length_compiles_nothing_new() -> None:
    model, _ = patched(tiny_model(), backend="aot_eager")
    for length in (8, 12):
        model.module.model(torch.zeros(2, length, dtype=torch.long), use_cache=False)
    before = counters["stats"]["unique_graphs"]
    model.module.model(torch.zeros(2, 17, dtype=torch.long), use_cache=False)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("scope", ["layers", "model"])
def test_generating_compiles_nothing_and_leaves_training_compiled(scope: str) -> None:
    model, _ = patched(tiny_model(), scope=scope, backend="aot_eager")
    step(model)
    before = counters["stats"]["unique_graphs"]
    model.module.eval().generate(torch.arange(5)[None], max_new_tokens=12, do_sample=False)
    model.module.train()
    step(model)
    assert counters["stats"]["unique_graphs"] == before


def test_a_run_in_which_nothing_is_compiled_does_not_begin() -> None:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["compile"], "compile": {"roles": ["teacher"]}})
    ctx.each(hooks.patch_modules, ctx, tiny_model(), "compile")
    with pytest.raises(ConfigError, match=r"compile\.roles is teacher, and this run has no such model"):
        ctx.notify(RunStarted(job=None, step=0))


def test_other_roles_are_compiled_only_if_named() -> None:
    from dataclasses import replace

    reference = replace(tiny_model(), role="reference")
    for roles, count in ((["policy"], 0), (["policy", "reference"], 1)):
        ctx = compose({"model": {"name": "tiny"}, "plugins": ["compile"], "compile": {"roles": roles}})
        ((_, records),) = ctx.each(hooks.patch_modules, ctx, reference, "compile")
        assert len(records) == count


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"mode": "max-autotune", "options": {"max_autotune": True}}, "remove mode"),
        ({"backend": "eager", "mode": "default"}, "are inductor's"),
        ({"mode": "fastest"}, "Input should be|input should be"),
        ({"backend": "inducter"}, "Did you mean 'inductor'"),
        ({"options": {"max_autotun": True}}, "Did you mean 'max_autotune"),
    ],
)
def test_what_torch_does_not_have_is_refused_before_weights_are_read(settings: dict[str, Any], says: str) -> None:
    def checked() -> None:
        ctx = compose({"model": {"name": "tiny"}, "plugins": ["compile"], "compile": settings})
        ctx.notify(RunBegins())

    with pytest.raises(ConfigError, match=says):
        checked()
