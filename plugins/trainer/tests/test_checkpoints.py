"""A checkpoint is complete or absent, holds every state or is refused, and rotation never takes the last one.

Kills at any moment are in test_resume.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import PluginError, RunError
from pegbox.hooks import hookimpl
from pegbox_trainer.states import random_state, read_state, restore_random_state, write_state
from tiny_runs import checkpoint, records, run


class Counter:
    """A plugin with a state; `broken` is what it holds beside the count; `full` fails as a full disk would."""

    def __init__(self, broken: object = None, scope: str = "global", *, full: bool = False) -> None:
        self.state_scope, self.count, self.broken, self.full = scope, 0, broken, full

    @hookimpl
    def on_event(self, event: Any) -> None:
        self.count += type(event).__name__ == "Stepped"

    def state_dict(self) -> dict[str, object]:
        if self.full and self.count > 2:
            raise OSError(28, "No space left on device")
        return {"count": self.count, "tensor": torch.full((2,), float(self.count)), "other": self.broken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["tensor"].tolist() == [state_dict["count"]] * 2
        self.count = state_dict["count"]


def steps_on_disk(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("keep", "save_every", "left"), [(None, 1, [1, 2, 3, 4, 5]), (2, 1, [4, 5]), (1, 1, [5]), (3, 2, [2, 4, 5])]
)
def test_rotation_keeps_the_newest(config: Any, tmp_path: Path, keep: int, save_every: int, left: list[int]) -> None:
    run(config(max_steps=5, keep=keep, save_every=save_every))
    assert steps_on_disk(tmp_path / "run") == left
    assert sorted(path.name[:5] for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-"] * len(left)


def test_an_old_checkpoint_goes_only_when_the_new_one_is_complete(config: Any, tmp_path: Path) -> None:
    keys = {"max_steps": 5, "keep": 1, "save_every": 2, "plugins": ["counter"]}
    with pytest.raises(RunError, match=r"could not save a checkpoint in .*No space left") as failure:
        run(config(**keys), counter=Counter(full=True))
    assert "untouched" in failure.value.why
    assert steps_on_disk(tmp_path / "run") == [2]
    counter = Counter()
    outcome = run(config(resume="auto", **keys), counter=counter)
    assert (outcome.step, counter.count) == (5, 5)
    assert steps_on_disk(tmp_path / "run") == [5]


def test_what_a_checkpoint_holds_is_listed_in_it(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=2, plugins=["counter"]), counter=Counter(scope="rank"))
    folder = checkpoint(tmp_path / "run", 2)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["states"] == {"counter/plugin": "rank", "trainer/batches": "global", "trainer/loop": "rank"}
    assert (meta["step"], meta["world_size"]) == (2, 1)
    assert meta["plan"] == json.loads((tmp_path / "run" / "run.json").read_text())["digest"]
    assert meta["versions"]["torch"] == torch.__version__
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "meta.json",
        "model.safetensors",
        "optimizer.pt",
        "random/rank-00000.pt",
        "schedule.pt",
        "states/counter/plugin.rank-00000.pt",
        "states/trainer/batches.pt",
        "states/trainer/loop.rank-00000.pt",
    ]


def test_a_state_that_nobody_claims_is_an_error(config: Any) -> None:
    run(config(max_steps=2, plugins=["counter"]), counter=Counter())
    with pytest.raises(RunError, match="nothing in this run claims: counter/plugin") as failure:
        run(config(max_steps=4, resume="auto"))
    assert failure.value.next == "Add counter to plugins again."


def test_a_state_that_is_missing_is_an_error(config: Any) -> None:
    run(config(max_steps=2))
    with pytest.raises(RunError, match="has no state for counter/plugin"):
        run(config(max_steps=4, plugins=["counter"], resume="auto"), counter=Counter())


def test_a_state_whose_scope_changed_is_an_error(config: Any) -> None:
    run(config(max_steps=2, plugins=["counter"]), counter=Counter())
    with pytest.raises(RunError, match="counter/plugin was saved as 'global' and is now 'rank'"):
        run(config(max_steps=4, plugins=["counter"], resume="auto"), counter=Counter(scope="rank"))


def test_a_state_that_cannot_be_dealt_out_anew_keeps_the_number_of_processes(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=2, plugins=["counter"]), counter=Counter(scope="rank"))
    meta = checkpoint(tmp_path / "run", 2) / "meta.json"
    meta.write_text(meta.read_text().replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(RunError, match="was written by 2 processes, this run has 1") as failure:
        run(config(max_steps=4, plugins=["counter"], resume="auto"), counter=Counter(scope="rank"))
    assert "counter/plugin" in failure.value.why
    assert "--processes 2" in failure.value.next


def test_a_checkpoint_of_another_format_is_refused(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=2))
    meta = checkpoint(tmp_path / "run", 2) / "meta.json"
    meta.write_text(meta.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(RunError, match="has checkpoint format 1, this version reads 2"):
        run(config(max_steps=4, resume="auto"))


@pytest.mark.parametrize("file", ["meta.json", "model.safetensors", "optimizer.pt", "schedule.pt"])
def test_a_damaged_checkpoint_is_named_with_those_to_go_on_from(config: Any, tmp_path: Path, file: str) -> None:
    run(config(max_steps=4, save_every=2))
    damaged = checkpoint(tmp_path / "run", 4) / file
    damaged.write_bytes(damaged.read_bytes()[:10])
    with pytest.raises(RunError, match=rf"step-00000004/{re.escape(file)} cannot be read: \S+") as failure:
        run(config(max_steps=6, resume="auto"))
    assert failure.value.next == "Type resume=NAME with another checkpoint: step-00000002"
    assert run(config(max_steps=6, resume="step-00000002")).step == 6


def test_a_checkpoint_of_other_parameters_is_refused(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=2))
    weights = checkpoint(tmp_path / "run", 2) / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:1].clone()
    tensors["elsewhere.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, weights)
    with pytest.raises(RunError, match=r"other trained parameters .* elsewhere.weight, lm_head.weight, model.norm"):
        run(config(max_steps=4, resume="auto"))


def test_a_folder_without_its_list_is_no_checkpoint(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=4, save_every=2))
    (checkpoint(tmp_path / "run", 4) / "meta.json").unlink()
    outcome = run(config(max_steps=4, save_every=2, resume="auto"))
    assert outcome.step == 4
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4]


def test_half_written_checkpoints_are_removed_when_the_store_opens(config: Any, tmp_path: Path) -> None:
    run(config(max_steps=2))
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / ".tmp-step-00000003")
    (folder / ".tmp-delete-step-00000001").mkdir()
    run(config(max_steps=2, resume="auto"))
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    ("broken", "where"),
    [(object(), r"a builtins.object at \['other'\]"), ({"in": [Path()]}, r"at \['other'\]\['in'\]\[0\]")],
)
def test_a_state_that_could_not_be_read_without_running_code_is_refused_when_written(
    config: Any, broken: object, where: str
) -> None:
    with pytest.raises(PluginError, match=f"the state 'counter/plugin' holds .*{where}"):
        run(config(max_steps=2, plugins=["counter"]), counter=Counter(broken))


def test_plain_states_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"a": [1, 2.5, None, True, "x", b"y"], 3: (torch.arange(4, dtype=torch.uint8), {"z"}), "d": torch.float16}
    write_state(tmp_path / "deep" / "state.pt", state, "a test")
    again = read_state(tmp_path / "deep" / "state.pt")
    assert torch.equal(again[3][0], state[3][0])  # type: ignore[index]
    del again[3], state[3]
    assert again == state


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    import random

    import numpy

    def draw() -> list[float]:
        return [random.random(), float(numpy.random.standard_normal()), float(torch.rand(1)), random.gauss(0, 1)]

    draw()
    write_state(tmp_path / "state.pt", random_state(torch.device("cpu")), "a test")
    expected = [draw(), draw()]
    restore_random_state(read_state(tmp_path / "state.pt"), torch.device("cpu"))
    assert [draw(), draw()] == expected


def test_buffers_that_training_changed_come_back(config: Any, tmp_path: Path) -> None:
    class Changer:
        """Writes to a buffer of the model at each step, as a router's load balancing does."""

        seen = 0.0

        @hookimpl
        def on_event(self, event: Any) -> None:
            kind = type(event).__name__
            if kind == "Stepped":
                event.model.module.model.rotary_emb.inv_freq.mul_(0.5)
            if kind == "RunStarted":
                self.seen = float(event.job.model.module.model.rotary_emb.inv_freq[0])

    first, second = Changer(), Changer()
    run(config(max_steps=2, plugins=["changer"]), changer=first)
    run(config(max_steps=4, plugins=["changer"], resume="auto"), changer=second)
    assert second.seen == first.seen / 4
