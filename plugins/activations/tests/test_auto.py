"""The policy `auto`: what layers keep follows from memory, and what is computed does not follow from what they keep."""

from __future__ import annotations

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.errors import ConfigError
from pegbox.events import GradientsReady, RunStarted, Stepped
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.rows import Batch
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import tiny_batches, tiny_model
from pegbox.types import Model, ModulePatch
from pegbox_activations.attention import is_attention
from pegbox_activations.auto import AutoPolicy, shape_of
from pegbox_activations.budget import Choice, LayerBytes, Measured, Shape, choose
from torch.utils._python_dispatch import TorchDispatchMode

LAYERS = 6
ROOMY = 1.0


class Counted(TorchDispatchMode):
    """Counts calls of attention, forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += is_attention(func)
        return func(*args, **(kwargs or {}))


class Run:
    """Steps of a model under the plugin, with the events that a loop sends."""

    def __init__(self, folder: Path, *plugins: str, runtime: Any = None, **settings: Any) -> None:
        self.model: Model = tiny_model(num_hidden_layers=LAYERS)
        self.ctx: Context = compose(
            {
                "model": {"name": "tiny"},
                "plugins": [*plugins, "activations"],
                "output": str(folder / "run"),
                "activations": settings,
            }
        )
        self.ctx.runtime = runtime or FakeRuntime()
        if plugins:
            self.model = self.ctx.call(hooks.apply_adapters, self.ctx, self.model)
        self.log = PatchLog()
        self.log.apply(self.model, self.ctx.each(hooks.patch_modules, self.ctx, self.model, "recompute"))
        trained = [p for p in self.model.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        self.steps = 0

    @property
    def auto(self) -> AutoPolicy:
        auto = self.ctx.kernel.active["activations"].instance._auto  # type: ignore[attr-defined]
        assert auto is not None
        return auto  # type: ignore[no-any-return]

    def step(self, *batches: Batch) -> list[torch.Tensor]:
        """Gradients of one step."""
        for batch in batches:
            (-self.model.compute(self.model.module, batch, frozenset({"logps"})).logps_N).mean().backward()
        self.steps += 1
        told = {"step": self.steps, "model": self.model, "optimizer": self.optimizer}
        self.ctx.notify(GradientsReady(**told))
        gradients = [p.grad.clone() for p in self.model.module.parameters() if p.grad is not None]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ctx.notify(Stepped(**told, loss=torch.zeros(())))
        return gradients


def batch_of(rows: int, tokens: int) -> Batch:
    """Rows of one length."""
    ids = torch.arange(rows * tokens).remainder(250).reshape(rows, tokens)
    targets = torch.roll(ids, -1, 1)
    targets[:, -1] = -100
    trained = (targets.flatten() != -100).nonzero().flatten()
    return Batch(input_ids_BT=ids, targets_BT=targets, trained_N=trained)


def kept_bytes(run: Run, batch: Batch) -> int:
    """What autograd keeps of the layers for a batch, by hooks around the whole trunk, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in (*run.model.module.parameters(), *run.model.module.buffers())}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run.model.module.model(batch.input_ids_BT, use_cache=False).last_hidden_state
    del kept
    return sum(size for address, size in seen.items() if address not in own)


def layers_bytes(folder: Path) -> tuple[int, int]:
    """What is needed with nothing kept and with everything, as the plugin counts."""
    run = Run(folder / "any", policy="auto", memory_gib=ROOMY)
    for _ in range(4):
        run.step(batch_of(2, 16))
    known, shape = run.auto._measured, Shape(32, 16)
    assert known is not None
    return round(known.base(shape)), round(known.need(Choice(LAYERS), shape))


# ---- the choice ----

KNOWN = Measured(Shape(100, 50), 1000, 200, (LayerBytes(10, 100, 20, 30),) * 4)


@pytest.mark.parametrize("shape", [Shape(100, 50), Shape(40, 20), Shape(200, 100), Shape(400, 50)])
def test_a_choice_fits_and_one_more_layer_would_not(shape: Shape) -> None:
    count = len(KNOWN.layers)
    for limit in range(1000, 2400, 37):
        choice = choose(KNOWN, limit, shape)
        if choice != Choice():
            assert KNOWN.need(choice, shape) <= limit
        if choice.whole + choice.attention < count:
            assert KNOWN.need(Choice(choice.whole, choice.attention + 1), shape) > limit
        elif choice.whole < count:
            assert KNOWN.need(Choice(choice.whole + 1, choice.attention - 1), shape) > limit


def test_attention_is_kept_before_whole_layers() -> None:
    assert choose(KNOWN, 1200 + 3 * 30, Shape(100, 50)) == Choice(0, 3)
    assert choose(KNOWN, 1200 + 4 * 30 + 100, Shape(100, 50)) == Choice(1, 3)
    assert choose(KNOWN, 1200 + 130, Shape(100, 50), attention=False) == Choice(1, 0)
    assert [Choice(1, 2).kind(index, 4) for index in range(4)] == ["inputs", "attention", "attention", "whole"]


def test_more_tokens_and_longer_rows_never_keep_more() -> None:
    chosen = [choose(KNOWN, 1500, Shape(tokens, row)).whole for tokens, row in ((20, 10), (100, 50), (200, 50))]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > chosen[-1]
    assert choose(KNOWN, 1700, Shape(100, 400)).whole < choose(KNOWN, 1700, Shape(100, 50)).whole


# ---- what is measured ----


def test_what_one_layer_was_seen_to_keep_is_what_all_layers_keep(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    run.step(batch_of(2, 16))
    known = run.auto._measured
    assert known is not None
    plain = Run(tmp_path / "plain", policy="full")
    plain.log.undo()
    everything = kept_bytes(plain, batch_of(2, 16))
    recomputed = kept_bytes(Run(tmp_path / "full", policy="full"), batch_of(2, 16))
    predicted = sum(known.whole(index, Shape(32, 16)) for index in range(LAYERS))
    assert predicted == pytest.approx(everything - recomputed, rel=0.02)


def test_attention_is_a_small_part_of_what_a_layer_keeps(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    run.step(batch_of(2, 16))
    known = run.auto._measured
    assert known is not None
    output, log_sum_exp = 2 * 16 * 64 * 4, 2 * 16 * 4 * 4
    assert {layer.attention for layer in known.layers} == {output + log_sum_exp}
    assert all(0 < layer.attention < 0.2 * layer.tokens for layer in known.layers)


# ---- runs ----


def test_the_first_step_recomputes_and_later_ones_what_does_not_fit(tmp_path: Path) -> None:
    nothing, everything = layers_bytes(tmp_path)
    whole = []
    for part in (0.0, 0.5, 1.0):
        gib = (nothing + part * (everything - nothing) + 1000) / (1 << 30)
        run = Run(tmp_path / str(part), policy="auto", memory_gib=gib, margin=0.0)
        run.step(batch_of(2, 16))
        assert run.auto.choice == Choice()
        for _ in range(4):
            run.step(batch_of(2, 16))
        whole.append(run.auto.choice.whole)
    assert whole[0] == 0
    assert 0 < whole[1] < LAYERS
    assert whole[2] == LAYERS


@pytest.mark.parametrize("part", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("adapted", [False, True])
def test_loss_and_gradients_do_not_depend_on_the_choice_to_the_bit(tmp_path: Path, part: float, adapted: bool) -> None:
    nothing, everything = layers_bytes(tmp_path)
    gib = (nothing + part * (everything - nothing) + 1000) / (1 << 30)
    plugins = ["lora"] if adapted else []
    plain = Run(tmp_path / "plain", *plugins, policy="full")
    plain.log.undo()
    run = Run(tmp_path / "auto", *plugins, policy="auto", memory_gib=gib, margin=0.0)
    for batches in ((batch_of(2, 16),), (batch_of(1, 8), batch_of(2, 16)), tiny_batches(), (batch_of(3, 20),)):
        expected, got = plain.step(*batches), run.step(*batches)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    run.log.verify()


def test_short_batches_keep_more_and_longer_ones_than_all_before_less(tmp_path: Path) -> None:
    nothing, everything = layers_bytes(tmp_path)
    gib = (nothing + 0.6 * (everything - nothing)) / (1 << 30)
    run = Run(tmp_path, policy="auto", memory_gib=gib, margin=0.0)
    for _ in range(4):
        run.step(batch_of(2, 16))
    usual = run.auto.choice
    run.step(batch_of(1, 8))
    short = run.auto.choice
    run.step(batch_of(3, 16))
    long = run.auto.choice
    assert short.whole == LAYERS > usual.whole > long.whole
    assert run.auto.choice.whole + run.auto.choice.attention <= LAYERS


def test_the_choice_is_said_once_and_kept_beside_the_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    with caplog.at_level(logging.INFO, "pegbox"):
        for _ in range(6):
            run.step(batch_of(2, 16))
    said = [record.getMessage() for record in caplog.records if "activations" in record.getMessage()]
    assert len(said) == 1
    assert f"{LAYERS} of {LAYERS} layers keep everything" in said[0]
    content = json.loads((run.ctx.folder / "activations.json").read_text())
    assert content["keep_everything"] == LAYERS
    assert content["for"] == {"tokens": 32, "row": 16}


def test_an_optimizer_step_that_was_skipped_is_waited_for(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    kept, run.optimizer.step = run.optimizer.step, lambda *_: None  # type: ignore[assignment, method-assign]
    run.step(batch_of(2, 16))
    assert run.auto._measured is None
    run.optimizer.step = kept  # type: ignore[method-assign]
    run.step(batch_of(2, 16))
    weights = sum(p.numel() * 4 for p in run.model.module.parameters())
    assert run.auto._measured is not None
    assert run.auto._measured.fixed > 4 * weights


def test_where_processes_must_recompute_alike_the_smallest_choice_holds(tmp_path: Path) -> None:
    class Two(FakeRuntime):
        world_size = 2

        def gather_objects(self, value: object) -> list[object]:
            return [value, (2, 3)]

    run = Run(tmp_path, policy="auto", memory_gib=ROOMY, runtime=Two())
    run.step(batch_of(2, 16))
    run.auto._together = True
    for tokens in (16, 16, 8, 24):
        run.step(batch_of(2, tokens))
        assert run.auto.choice == Choice(2, 1)


def test_evaluation_decides_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    run.model.module.eval()
    run.model.compute(run.model.module, batch_of(2, 16), frozenset({"logps"}))
    assert run.auto._gauge is None


# ---- keeping attention under a fixed policy ----


@pytest.mark.parametrize("settings", [{}, {"policy": 2}, {"modules": r".*\.self_attn"}])
def test_attention_that_is_kept_is_computed_once(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = Run(tmp_path / "plain", policy="full")
    plain.log.undo()
    kept = Run(tmp_path / "kept", keep="attention", **settings)
    with Counted() as counted:
        got = kept.step(batch_of(2, 16))
    assert counted.calls == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(got, plain.step(batch_of(2, 16)), strict=True))


def test_under_auto_layers_keep_attention_first(tmp_path: Path) -> None:
    nothing, everything = layers_bytes(tmp_path)
    run = Run(tmp_path, policy="auto", memory_gib=(nothing + 0.1 * (everything - nothing)) / (1 << 30), margin=0.0)
    with Counted() as first:
        run.step(batch_of(2, 16))
    with Counted() as second:
        run.step(batch_of(2, 16))
    assert (run.auto.choice.whole, run.auto.choice.attention) == (0, 6)
    assert first.calls == 2 * LAYERS - 1
    assert second.calls == LAYERS


def test_without_keeping_it_attention_is_computed_twice(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="full")
    with Counted() as counted:
        run.step(batch_of(2, 16))
    assert counted.calls == 2 * LAYERS


def test_attention_with_dropout_is_not_kept() -> None:
    from pegbox_activations.attention import can_be_kept

    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert can_be_kept(operator, (None, None, None, 0.0, True), {})
    assert not can_be_kept(operator, (None, None, None, 0.1, True), {})
    assert not can_be_kept(torch.ops.aten._scaled_dot_product_flash_attention_backward.default, (), {})


def test_operators_of_a_kernel_library_are_known_by_their_names() -> None:
    library = torch.library.Library("pegbox_activations_test", "FRAGMENT")
    library.define("attention(Tensor q) -> (Tensor, Tensor)")
    library.define("attention_backward(Tensor q) -> Tensor")
    library.define("attention_out(Tensor q, Tensor(a!) out) -> Tensor(a!)")
    operators = torch.ops.pegbox_activations_test
    assert is_attention(operators.attention.default)
    assert not is_attention(operators.attention_backward.default)
    assert not is_attention(operators.attention_out.default)
    assert not is_attention(torch.ops.aten.mm.default)


def test_a_network_without_such_operators_is_an_error(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="full", keep="attention")
    run.model.module.config._attn_implementation = "eager"
    with pytest.raises(ConfigError, match="no operator of attention was seen"):
        run.step(batch_of(2, 16))


def test_eager_attention_is_seen_to_grow_with_the_square_of_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    run.model.module.config._attn_implementation = "eager"
    run.step(batch_of(2, 24))
    known = run.auto._measured
    assert known is not None
    assert all(layer.pairs >= 2 * 4 * 24 * 24 * 4 for layer in known.layers)


# ---- bad input ----


def test_without_a_device_to_ask_a_limit_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="memory_gib"):
        Run(tmp_path, policy="auto")


def test_compiled_layers_are_refused(tmp_path: Path) -> None:
    run = Run(tmp_path, policy="auto", memory_gib=ROOMY)
    record = ModulePatch(slot="compile", target="layers.*", replace=lambda m: partial(m.forward), reason="compiled")
    run.ctx.kernel.patches.apply(run.model, [("some-compiler", [record])])
    job: Any = None
    with pytest.raises(ConfigError, match="'some-compiler' compiles layers"):
        run.ctx.notify(RunStarted(job=job, step=0))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory_gib": 4.0}, "belongs to policy auto"),
        ({"policy": 2, "margin": 0.2}, "belongs to policy auto"),
        ({"policy": "auto", "reentrant": True}, "remove reentrant"),
        ({"policy": "auto", "offload": "cpu"}, "remove offload"),
        ({"policy": "auto", "modules": "x"}, "keep one of them"),
        ({"policy": "none", "offload": "cpu", "keep": "attention"}, "remove keep"),
        ({"keep": "attention", "reentrant": True}, "remove one of them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "tiny"}, "plugins": ["activations"], "activations": settings})


def test_shapes_are_read_from_hidden_states() -> None:
    assert shape_of(torch.empty(2, 16, 64)) == Shape(32, 16)
    assert shape_of(torch.empty(16, 64)) == Shape(16, 16)
