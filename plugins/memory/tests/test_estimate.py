"""An estimate is what a run then has in memory: counted in the real trainer on a CPU, and by torch's own tracker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from measured_run import peak_of_run
from pegbox.errors import ConfigError, RunError
from pegbox_memory.estimate import GIB, Estimate, _largest, estimate
from pegbox_memory.ledger import Ledger
from torch import nn

Config = Callable[..., dict[str, Any]]
CHUNKED: dict[str, Any] = {"chunked-cross-entropy": {"chunk": 64}}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": ((), {}),
    "full, tied": ((), {"model": "tied"}),
    "full, accumulated": ((), {"trainer": {"accumulation": 3}}),
    "full, recomputed": (("activations",), {}),
    "full, recomputed but attention": (("activations",), {"activations": {"keep": "attention"}}),
    "full, chunked head": (("chunked-cross-entropy",), CHUNKED),
    "full, bf16": ((), {"trainer": {"precision": "bf16"}}),
    "lora": (("lora",), {"lora": {"r": 8}}),
    "lora, recomputed, chunked head": (("lora", "activations", "chunked-cross-entropy"), CHUNKED),
    "lora, half recomputed, bf16": (
        ("lora", "activations"),
        {"activations": {"policy": 2}, "trainer": {"precision": "bf16"}},
    ),
    "packed": (("packing",), {"packing": {"length": 128}}),
    "packed, recomputed": (("packing", "activations"), {"packing": {"length": 128}}),
    "medium, lora, recomputed": (("lora", "activations"), {"model": "medium"}),
    "medium, full": ((), {"model": "medium"}),
    "mixture, lora": (("lora",), {"model": "mixture"}),
    "gpt-oss, lora, recomputed": (("lora", "activations"), {"model": "gpt-oss"}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_estimate_is_what_a_run_has_in_memory(config_of: Config, case: str) -> None:
    plugins, sections = CASES[case]
    config = config_of(*plugins, **sections)
    length = 128
    made = estimate(config, tokens=None if "packing" in plugins else length)
    truth = peak_of_run(config, length // 2 if "packing" in plugins else length)
    assert made.allocated == pytest.approx(truth, rel=0.1)


def test_the_ledger_counts_as_torchs_own_tracker_does() -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    def peaks(mode: Any, module: nn.Module, forget: Callable[[], None]) -> None:
        optimizer = torch.optim.AdamW(module.parameters())
        with mode:
            for _ in range(2):
                forget()
                module(torch.randn(64, 256)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.LayerNorm(256))

    theirs, module = MemTracker(), network()
    theirs.track_external(module)
    peaks(theirs, module, theirs.reset_mod_stats)
    expected = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    ours, module = Ledger(), network()
    ours.note(module.parameters(), "weights")
    peaks(ours, module, lambda: None)
    assert ours.peak_bytes == pytest.approx(expected, rel=0.02)


def test_rows_sum_to_what_is_allocated_and_name_who_brings_them(config_of: Config) -> None:
    config = config_of("lora", "activations", "chunked-cross-entropy", **CHUNKED)
    made = estimate(config, tokens=64)
    assert sum(row.bytes for row in made.rows) == made.allocated
    who = {row.kind: row.plugin for row in made.rows}
    assert who["frozen weights"] == "hf"
    assert who["adapters"] == "lora"
    assert who["optimizer"] == "adamw"
    assert who["layers"] == "activations"


def test_weights_adapters_and_optimizer_are_counted_exactly(config_of: Config, model_folder: Any) -> None:
    from pegbox import hooks
    from pegbox.plan import compose
    from pegbox.types import ModelRequest

    config = config_of("lora", lora={"r": 8})
    made = {row.kind: row.bytes for row in estimate(config, tokens=64).rows}
    ctx = compose(config)
    model = ctx.call(hooks.load_model, ctx, ModelRequest(name=config["model"]["name"], format="transformers"))
    frozen = sum(p.numel() * 4 for p in model.module.parameters())
    model = ctx.call(hooks.apply_adapters, ctx, model)
    trained = [p for p in model.module.parameters() if p.requires_grad]
    adapters = sum(p.numel() * p.element_size() for p in trained)
    counters = 512 * len(trained)
    assert made["frozen weights"] == pytest.approx(frozen, rel=0.01)
    assert made["adapters"] == pytest.approx(adapters, rel=0.01)
    assert made["optimizer"] == pytest.approx(2 * adapters + counters, rel=0.01)


def test_nothing_is_left_on_the_classes_and_no_weights_are_read(config_of: Config, model_folder: Any) -> None:
    config = config_of("lora", "activations")
    for weights in model_folder("small").glob("*.safetensors"):
        hidden = weights.rename(weights.with_suffix(".hidden"))
        try:
            assert estimate(config, tokens=64).allocated > 0
        finally:
            hidden.rename(weights)


def test_for_a_gpu_reserve_context_and_workspace_come_on_top(config_of: Config) -> None:
    config = config_of(trainer={"device": "auto", "precision": "bf16"})
    made = estimate(config, tokens=64, device_gib=1.0)
    assert made.process > made.reserved > made.allocated
    assert made.context == GIB // 2
    assert {"workspace"} <= {row.kind for row in made.rows}
    assert made.fits is True


def test_the_largest_micro_batch_fits_and_one_row_more_does_not(config_of: Config) -> None:
    config = config_of("activations")
    made = estimate(config, tokens=64, device_gib=0.06)
    best = made.largest_micro_batch
    assert best is not None
    for rows, fits in ((best, True), (best + 1, False)):
        assert estimate(config, tokens=64, micro_batch=rows, device_gib=0.06).fits is fits


@pytest.mark.parametrize("bends_at", [3, 17, 1000])
@pytest.mark.parametrize("device", [150, 1234, 4321, 99999])
def test_the_search_finds_the_last_size_that_fits_on_a_line_that_bends(bends_at: int, device: int) -> None:
    def need(rows: int) -> int:
        return max(100 + 10 * rows, 100 + 10 * bends_at + 37 * (rows - bends_at))

    class Made:
        def __init__(self, rows: int) -> None:
            self.process = need(rows)

    def of(rows: int) -> Estimate:
        return Made(rows)  # type: ignore[return-value]

    best = _largest(of, device)
    assert best is not None
    assert need(best) <= device < need(best + 1)


def test_with_too_little_memory_nothing_is_proposed(config_of: Config) -> None:
    made = estimate(config_of(), tokens=64, device_gib=0.001)
    assert made.fits is False
    assert made.largest_micro_batch is None


@pytest.mark.parametrize(("gib", "recomputed"), [(0.008, {3}), (0.0105, {1, 2}), (1.0, {0})])
def test_a_policy_that_goes_by_memory_recomputes_what_does_not_fit(
    config_of: Config, gib: float, recomputed: set[int]
) -> None:
    config = config_of("activations", activations={"policy": "auto", "memory_gib": gib, "margin": 0.0})
    made = estimate(config, tokens=128, device_gib=1.0)
    assert made.recomputed in recomputed, (made.allocated / GIB, made.recomputed)


def test_more_is_needed_the_less_is_recomputed(config_of: Config) -> None:
    sizes = [estimate(config_of(), tokens=128).allocated]
    sizes += [estimate(config_of("activations", activations={"policy": n}), tokens=128).allocated for n in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True)


def test_an_optimizer_with_smaller_state_needs_less(config_of: Config) -> None:
    config = config_of()
    config["plugins"] = [name if name != "adamw" else "optim" for name in config["plugins"]]
    adamw = estimate({**config, "optim": {"name": "adamw"}}, tokens=16)
    sgd = estimate({**config, "optim": {"name": "sgd"}}, tokens=16)
    state = {row.kind: row.bytes for row in adamw.rows}["optimizer"]
    assert "optimizer" not in {row.kind for row in sgd.rows}
    assert adamw.allocated - sgd.allocated == pytest.approx(state, rel=0.05)


# ---- bad input ----


def test_rows_of_unknown_length_are_asked_for(config_of: Config) -> None:
    with pytest.raises(ConfigError, match="--tokens"):
        estimate(config_of())


def test_a_device_without_memory_is_refused(config_of: Config) -> None:
    with pytest.raises(ConfigError, match="device-gib"):
        estimate(config_of(), tokens=16, device_gib=0.0)


def test_a_model_that_looks_at_values_is_named(config_of: Config) -> None:
    from pegbox.hooks import hookimpl
    from pegbox.types import ModulePatch

    class Curious:
        @hookimpl
        def patch_modules(self, model: Any, stage: str) -> list[ModulePatch]:
            if stage != "base":
                return []

            def look(module: Any) -> Any:
                original = module.forward
                return lambda hidden: original(hidden[hidden.abs().sum(-1).nonzero(as_tuple=True)])

            return [ModulePatch(slot="curious", target="layers.0.mlp", replace=look, reason="looks at values")]

    from pegbox.plan import compose
    from pegbox_memory.step import trained_step

    ctx = compose({**config_of(), "plugins": ["curious", *config_of()["plugins"]]}, instances={"curious": Curious()})
    step = trained_step(ctx, torch.device("cpu"), "fp32")
    with pytest.raises(RunError, match="cannot be made without data"):
        step.peak(1, 8, bins=False, micro_batches=1)
