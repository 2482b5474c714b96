"""A stream gives the rows of memory in their order, over and over, and goes on from any place as if never stopped."""

from __future__ import annotations

import json
import threading

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pegbox.errors import ConfigError, DataError, RunError
from pegbox.rows import ExampleStream


def rows(count: int, name: str = "") -> list[dict[str, str]]:
    return [{"prompt": "n", "completion": f"{name}{i}"} for i in range(count)]


def entry(path: str, **keys: object) -> dict[str, object]:
    return {"path": path, "format": "completion", **keys}


def taken(workspace, stream, count: int) -> list[str]:
    return [word.removesuffix("<|im_end|>") for word in workspace.words(stream.take(count))]


@pytest.fixture
def streams(workspace):
    """Opens streams, and ends their threads afterwards."""
    opened = []

    def stream(data, **keys):
        opened.append(workspace.examples({"streaming": True, "cache": "off", **data}, **keys))
        return opened[-1]

    yield stream
    for one in opened:
        one.close()


def test_it_gives_the_rows_of_memory_in_their_order_and_begins_anew(workspace, streams):
    workspace.write("a.jsonl", rows(70, "a"))
    workspace.write("b.jsonl", rows(30, "b"))
    data = {"train": [entry("a.jsonl"), entry("b.jsonl")]}
    in_memory = workspace.examples({**data, "cache": "off"})
    stream = streams(data)
    assert isinstance(stream, ExampleStream)
    window = stream.take(100)
    for index in range(100):
        assert window[index].input_ids.tolist() == in_memory[index].input_ids.tolist()
        assert window[index].labels.tolist() == in_memory[index].labels.tolist()
        assert window.describe(index) == in_memory.describe(index)
    assert taken(workspace, stream, 101)[-2:] == ["b29", "a0"]


def test_read_ahead_and_the_size_of_windows_change_nothing(workspace, streams):
    workspace.write("a.jsonl", rows(40))
    sizes = [(1, 100), (7, 1), (100, 64)]
    results = []
    for window, ahead in sizes:
        stream = streams({"train": [entry("a.jsonl")], "read_ahead": ahead})
        results.append([word for _ in range(100 // window + 1) for word in taken(workspace, stream, window)][:100])
    assert results[0] == results[1] == results[2]


SOURCES = {
    "jsonl": lambda: "".join(json.dumps(row) + "\n\n" for row in rows(50)).encode(),
    "csv": lambda: b"prompt,completion\n" + b"".join(b"n,%d\n" % i for i in range(50)),
    "parquet": lambda: _parquet(),
}


def _parquet() -> bytes:
    import io

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(50)), sink, row_group_size=7)
    return sink.getvalue()


@pytest.mark.parametrize("source", SOURCES)
def test_a_run_that_stops_anywhere_skips_and_repeats_no_row(source, workspace, streams):
    workspace.write(f"a.{source}", SOURCES[source]())
    workspace.write("b.jsonl", [{"prompt": "n", "completion": "x" * length} for length in (3, 40, 1, 90, 25)])
    data = {
        "train": [entry(f"a.{source}", share=3.0), entry("b.jsonl", share=1.0)],
        "max_length": 32,
        "min_length": 6,
        "overlong": "split",
        "allow": ["no-trained-token"],
    }
    unbroken = taken(workspace, streams(data), 400)

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(stops=st.lists(st.integers(1, 60), min_size=1, max_size=4))
    def check(stops):
        seen, state = [], None
        for count in stops:
            stream = streams(data)
            if state is not None:
                stream.load_state_dict(json.loads(json.dumps(state)))
            seen += taken(workspace, stream, count)
            state = stream.state_dict()
            stream.close()
        assert seen == unbroken[: len(seen)]

    check()


def test_a_stream_goes_on_in_place_after_its_state_is_loaded(workspace, streams):
    workspace.write("a.jsonl", rows(50))
    stream = streams({"train": [entry("a.jsonl")]})
    stream.take(10)
    state = stream.state_dict()
    first = taken(workspace, stream, 20)
    stream.load_state_dict(state)
    assert taken(workspace, stream, 20) == first


def test_going_on_reads_nothing_before_the_place(workspace, streams, monkeypatch):
    from pegbox_data.sources import JsonLines

    workspace.write("a.jsonl", rows(5000))
    stream = streams({"train": [entry("a.jsonl")], "read_ahead": 64})
    stream.take(4000)
    state = stream.state_dict()
    other = streams({"train": [entry("a.jsonl")], "read_ahead": 64})
    lines = []
    original = JsonLines.read

    def read(self, file, options, start):
        for one in original(self, file, options, start):
            lines.append(one.line)
            yield one

    monkeypatch.setattr(JsonLines, "read", read)
    other.load_state_dict(state)
    assert taken(workspace, other, 2) == ["4000", "4001"]
    assert min(lines) == 4001


def test_shares_are_the_shares_of_rows_drawn_and_depend_on_the_seed(workspace, streams):
    workspace.write("a.jsonl", rows(60, "a"))
    workspace.write("b.jsonl", rows(40, "b"))
    data = {"train": [entry("a.jsonl", share=4.0), entry("b.jsonl", share=1.0)]}
    words = taken(workspace, streams(data), 2000)
    assert sum(word[0] == "a" for word in words) == pytest.approx(1600, abs=60)
    assert [word for word in words if word[0] == "a"][:130] == [f"a{i % 60}" for i in range(130)]
    assert words == taken(workspace, streams(data), 2000)
    assert words != taken(workspace, streams(data, seed=1), 2000)


def test_limits_and_slices_bound_every_round(workspace, streams):
    workspace.write("a.jsonl", rows(10))
    assert taken(workspace, streams({"train": [entry("a.jsonl", split="[2:8]", limit=3)]}), 7) == list("2342342")
    with pytest.raises(ConfigError, match="How many rows a stream has is not known"):
        streams({"train": [entry("a.jsonl", split="[:50%]")]}).take(1)


def test_what_is_left_out_is_counted_once_however_often_the_run_stops(workspace, streams):
    workspace.write("a.jsonl", [{"prompt": "n", "completion": "x" * (50 if i % 5 == 0 else 2)} for i in range(40)])
    data = {"train": [entry("a.jsonl")], "max_length": 30}
    stream = streams(data)
    for _ in range(8):
        stream.take(4)
        state = stream.state_dict()
        stream.close()
        stream = streams(data)
        stream.load_state_dict(state)
    assert stream.rows == 32
    assert stream.counts == {"rows dropped: longer than data.max_length": 8}


def test_a_bad_row_is_named_when_its_turn_comes(workspace, streams):
    workspace.write("a.jsonl", [*rows(100), {"prompt": "n"}, *rows(3)])
    stream = streams({"train": [entry("a.jsonl")]})
    assert len(stream.take(100)) == 100
    with pytest.raises(DataError, match=r"^a\.jsonl:101: no field 'completion'"):
        stream.take(1)


def test_an_empty_file_and_rows_of_no_use_are_errors(workspace, streams, monkeypatch):
    workspace.write("a.jsonl", "\n\n")
    with pytest.raises(DataError, match=r"data\.train\.0 holds no rows"):
        streams({"train": [entry("a.jsonl")]}).take(1)
    monkeypatch.setattr("pegbox_data.stream.BARREN", 50)
    workspace.write("a.jsonl", [{"prompt": "n", "completion": "x" * 50}] * 3)
    with pytest.raises(DataError, match="none of 50 rows can be used"):
        streams({"train": [entry("a.jsonl")], "max_length": 20}).take(1)


def test_a_place_in_other_data_is_refused(workspace, streams):
    workspace.write("a.jsonl", rows(10))
    state = streams({"train": [entry("a.jsonl")]}).state_dict()
    workspace.write("a.jsonl", rows(11))
    with pytest.raises(RunError, match="belongs to other data"):
        streams({"train": [entry("a.jsonl")]}).load_state_dict(state)


def test_evaluation_rows_are_held_in_memory(workspace):
    workspace.write("a.jsonl", rows(10))
    data = {"train": [entry("a.jsonl")], "eval": [entry("a.jsonl")], "streaming": True, "cache": "off"}
    assert len(workspace.examples(data, "eval")) == 10


def test_its_thread_ends_with_the_run(workspace):
    from pegbox import hooks

    workspace.write("a.jsonl", rows(10))
    ctx = workspace.context({"train": [entry("a.jsonl")], "streaming": True})
    with ctx.exit:
        ctx.call(hooks.build_dataset, ctx, workspace.processor(), "train").take(3)
        assert any(thread.name == "pegbox-data" for thread in threading.enumerate())
    assert not any(thread.name == "pegbox-data" for thread in threading.enumerate())


def test_datasets_of_the_hub_are_streamed_from_their_own_place(workspace, streams, monkeypatch):
    monkeypatch.setattr("pegbox_data.hub.STATE_ROWS", 16)
    (workspace.folder / "repository").mkdir()
    workspace.write("repository/train.jsonl", rows(100))
    data = {"train": [entry("./repository", source="hub")]}
    unbroken = taken(workspace, streams(data), 250)
    assert unbroken == [str(i % 100) for i in range(250)]
    stream = streams(data)
    stream.take(137)
    other = streams(data)
    other.load_state_dict(stream.state_dict())
    assert taken(workspace, other, 113) == unbroken[137:]
