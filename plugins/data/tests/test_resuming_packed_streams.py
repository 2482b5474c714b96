"""A run over a packed stream that stops twice and goes on sees the very batches of a run that never stopped."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pegbox import hooks
from pegbox.context import Context
from pegbox.discovery import discover
from pegbox.plan import compose
from torch import device as Device  # noqa: N812 - a class

STEPS = 30
needed = {"packing", "trainer"}
pytestmark = pytest.mark.skipif(not needed <= set(discover()), reason=f"needs {needed}")


@dataclass(frozen=True)
class OneProcess:
    """The runtime of a run of one process, as far as batches need it."""

    rank: int = 0
    world_size: int = 1
    device: Device = field(default_factory=lambda: Device("cpu"))


@pytest.fixture(scope="module")
def composed(tmp_path_factory, chatml):
    """Composes the same run anew: two entries of rows of many lengths, shuffled in windows, packed, split if long."""
    from pegbox.types import Processor

    folder = tmp_path_factory.mktemp("packed-stream")
    for name, sizes in {"a": range(1, 60), "b": (3, 40, 1, 90, 25)}.items():
        lines = [json.dumps({"prompt": "n", "completion": f"{name}{'x ' * (size % 23)}{size}"}) for size in sizes]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def compose_run(output: str, read_ahead: int) -> Context:
        train = [
            {"path": str(folder / f"{name}.jsonl"), "format": "completion", "share": share}
            for name, share in (("a", 3.0), ("b", 1.0))
        ]
        data = {"train": train, "streaming": True, "max_length": 48, "overlong": "split", "read_ahead": read_ahead}
        ctx = compose(
            {
                "model": {"name": "none"},
                "plugins": ["data", "packing", "trainer"],
                "data": {**data, "allow": ["no-trained-token"]},
                "packing": {"length": 64},
                "trainer": {"max_steps": STEPS, "micro_batch": 2, "accumulation": 2, "stream_window": 37},
                "output": str(folder / output),
            }
        )
        ctx.processor = Processor(tokenizer=chatml, pad_id=0, fingerprint="test")
        ctx.runtime = OneProcess()  # type: ignore[assignment]
        return ctx

    return compose_run


def batches(ctx: Context, state: Any, steps: int) -> tuple[list[Any], Any]:
    """What the next steps see, as plain numbers, and the place behind them."""
    stream = ctx.call(hooks.build_dataset, ctx, ctx.processor, "train")
    source = ctx.call(hooks.build_batches, ctx, None, stream)
    if state is not None:
        source.load_state_dict(state)
    seen = []
    for step in source:
        seen.append([_numbers(batch) for batch in step])
        if len(seen) == steps:
            break
    place = source.state_dict()
    ctx.exit.close()
    return seen, json.loads(json.dumps(place))


def _numbers(batch: Any) -> dict[str, Any]:
    tensors = ("input_ids_BT", "targets_BT", "trained_N", "attention_mask_BT", "position_ids_BT", "cu_seqlens_S")
    found = {name: getattr(batch, name) for name in tensors}
    return {name: None if one is None else one.tolist() for name, one in found.items()} | {"rows": batch.rows}


def test_two_stops_anywhere_change_no_batch(composed):
    unbroken, _ = batches(composed("unbroken", 64), None, STEPS)
    assert len(unbroken) == STEPS
    assert any(len(one["cu_seqlens_S"]) > 3 for step in unbroken for one in step)

    @settings(max_examples=6, deadline=None, database=None)
    @given(stops=st.tuples(st.integers(1, 12), st.integers(1, 12)), ahead=st.sampled_from([1, 16, 256]))
    def check(stops, ahead):
        seen, state = [], None
        for number, steps in enumerate((*stops, STEPS)):
            now, state = batches(composed(f"resumed-{number}", ahead), state, steps)
            seen += now
        assert seen == unbroken

    check()
