"""Two processes that hold shards train as one that holds the model, go on exactly, and write what opens elsewhere.

Everything that needs two processes runs once, in one start of torchrun (gloo): see sharded_peers.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sharded_runs import (
    HALF,
    HERE,
    STEPS,
    config,
    exported,
    figures,
    in_subprocess,
    run,
    save_base,
    seen,
)

pytestmark = pytest.mark.distributed

ALIKE = {
    "full": ("full", "full-kept", "full-copies", "reentrant", "full-parted", "one-to-two"),
    "packed": ("packed",),
    "packed-thin": ("packed-thin",),
    "lora": ("lora", "lora-kept", "layers", "compiled", "offloaded", "lora-parted", "counted"),
    "schedule-free": ("schedule-free",),
}
"""Runs of one process, and those of two processes that must be the same."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all that `sharded_peers.py` does on two processes; half a run of one process is there before."""
    folder = tmp_path_factory.mktemp("sharded")
    save_base(folder / "base")
    save_base(folder / "deep", num_hidden_layers=8, vocab_size=264)
    run(config(folder / "base", folder / "one-to-two", trainer={"max_steps": HALF}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_subprocess(*launcher, str(HERE / "sharded_peers.py"), str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same trainings by one process without sharding."""
    from sharded_peers import VARIANTS

    for name in ALIKE:
        plugins, sections = VARIANTS[name]
        run(config(folder / "base", folder / "alone" / name, *plugins, sharded=False, **sections))
    return folder / "alone"


@pytest.mark.parametrize(("single", "name"), [(single, name) for single, names in ALIKE.items() for name in names])
def test_two_processes_with_shards_train_as_one_without(folder: Path, alone: Path, single: str, name: str) -> None:
    """Losses, gradient norms, held-out losses, and the weights that come out."""
    close = {"rtol": 2e-4, "atol": 1e-6}
    first = HALF if "one-to-two" in name else 0
    for kind, figure in (("train", "loss"), ("train", "grad_norm"), ("eval", "eval_loss")):
        ours, theirs = figures(folder / name, kind, figure), figures(alone / single, kind, figure)
        if name.endswith("-parted") or first:  # parts evaluate at their ends, too
            ours, theirs = (ours, theirs) if kind == "train" else (ours[-1:], theirs[-1:])
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(ours, theirs, **close)
    ours, theirs = exported(folder / name), exported(alone / single)
    assert ours.keys() == theirs.keys()
    for weight in ours:
        torch.testing.assert_close(ours[weight], theirs[weight], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_goes_on_to_the_bit_on_as_many_processes(folder: Path, name: str) -> None:
    assert_same_to_the_bit(folder, name)


def assert_same_to_the_bit(folder: Path, name: str) -> None:
    for figure in ("loss", "grad_norm"):
        whole, parted = (figures(folder / run, "train", figure) for run in (name, f"{name}-parted"))
        assert whole.tolist() == parted.tolist()
    whole, parted = exported(folder / name), exported(folder / f"{name}-parted")
    assert whole.keys() == parted.keys()
    for weight in whole:
        assert torch.equal(whole[weight], parted[weight])


def test_a_run_of_two_processes_goes_on_in_one(folder: Path) -> None:
    run(config(folder / "base", folder / "two-to-one", resume="auto"))
    ours, whole = folder / "two-to-one", folder / "full"
    torch.testing.assert_close(figures(ours, "train", "loss"), figures(whole, "train", "loss"), rtol=2e-4, atol=0)
    assert len(figures(ours, "train", "loss")) == STEPS
    for name, weight in exported(ours).items():
        torch.testing.assert_close(weight, exported(whole)[name], rtol=2e-3, atol=2e-4)


@pytest.mark.slow
def test_packed_optimizer_states_go_on_with_the_same_number_of_processes_only(tmp_path: Path) -> None:
    from pegbox.errors import RunError
    from sharded_peers import VARIANTS

    save_base(tmp_path / "deep", num_hidden_layers=8, vocab_size=264)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    in_subprocess(*launcher, str(HERE / "sharded_peers.py"), str(tmp_path), "slow")
    assert_same_to_the_bit(tmp_path, "packed-state")
    plugins, sections = VARIANTS["packed-state"]
    with pytest.raises(RunError, match="packed optimizer states of 2 processes"):
        run(config(tmp_path / "deep", tmp_path / "packed-state", *plugins, resume="step-00000006", **sections))


def test_each_hook_acts_in_its_order(folder: Path) -> None:
    """A patched MLP runs, inside its adapter, twice (it is recomputed), with weights gathered around it."""
    for rank in (0, 1):
        counts = seen(folder / "counted", rank)["counting"]
        micro_batches, layers = 2 * STEPS, 2
        assert counts == dict.fromkeys(("mlp", "layer", "gathered", "adapters"), 2 * layers * micro_batches)


def test_a_frozen_second_model_is_sharded_too(folder: Path) -> None:
    for rank in (0, 1):
        assert seen(folder / "second", rank)["second"] == {"difference": 0.0, "trained": 0}


def test_each_process_holds_its_part(folder: Path) -> None:
    parts = [seen(folder / "full", rank) for rank in (0, 1)]
    assert parts[0]["placement"] == "fsdp over 2 processes"
    assert sum(part["mine"] for part in parts) == parts[0]["whole"]
    assert max(part["mine"] for part in parts) < 0.51 * parts[0]["whole"]
    assert parts[0]["buffers"] == parts[1]["buffers"] != {}, "buffers that no checkpoint holds came over too"


def test_a_process_that_gets_its_weights_never_holds_all_of_them(folder: Path) -> None:
    whole = 4 * seen(folder / "loaded")["whole"]
    held = [json.loads((folder / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert held[0] >= whole, "the first process reads all"
    assert held[1] < 0.7 * whole, "its half, and one layer of eight"


def test_exports_open_in_transformers_and_peft(folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(12)[None]
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    before = base(ids).logits
    full, report = AutoModelForCausalLM.from_pretrained(folder / "full", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    adapted = PeftModel.from_pretrained(base, folder / "lora")
    assert all(weight.abs().max() > 0 for weight in exported(folder / "lora").values()), "every matrix was trained"
    for model in (full, adapted):
        assert (model(ids).logits - before).abs().max() > 0.1, "training moved it"
