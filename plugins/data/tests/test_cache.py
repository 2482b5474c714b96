"""Kept rows: found again when nothing that matters changed, made again when something did, never half written."""

from __future__ import annotations

import json
import multiprocessing
import os
import time

import numpy as np
import pytest
from pegbox_data import rows as rows_module
from pegbox_data.encoding import Encoder
from pegbox_data.files import DigestMemo


def conversation(answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]}


def content(examples):
    return [
        (examples[i].input_ids.tolist(), examples[i].labels.tolist(), dict(examples[i].columns), examples.describe(i))
        for i in range(len(examples))
    ]


@pytest.fixture
def encoded(monkeypatch):
    """Counts how many rows are tokenized."""
    counter = {"rows": 0}
    original = Encoder.encode

    def encode(self, rows):
        counter["rows"] += len(rows)
        return original(self, rows)

    monkeypatch.setattr(Encoder, "encode", encode)
    return counter


DATA = "train: [{path: rows.jsonl}], cache: kept, workers: 1"


def test_a_second_start_tokenizes_nothing_and_gives_the_same_rows(workspace, encoded):
    rows = [{**conversation(f"four {i} ünï"), "level": [i, None, "x"]} for i in range(300)]
    workspace.write("rows.jsonl", rows)
    data = f"{{{DATA}, columns: [level]}}"
    first = workspace.examples(data)
    assert encoded["rows"] == 300
    second = workspace.examples(data)
    assert encoded["rows"] == 300
    assert content(first) == content(second)
    assert first.fingerprint == second.fingerprint
    assert content(workspace.examples(data.replace("kept", "off"))) == content(first)


CHANGES = {
    "a format's option": ("{train: [{path: rows.jsonl, options: {turns: last}}], cache: kept}", True),
    "kept columns": (f"{{{DATA}, columns: [id]}}", True),
    "fewer rows": ("{train: [{path: rows.jsonl, limit: 2}], cache: kept}", True),
    "the longest row": (f"{{{DATA}, max_length: 50}}", False),
    "the shortest row": (f"{{{DATA}, min_length: 2}}", False),
    "another weight": ("{train: [{path: rows.jsonl, weight: 2}], cache: kept}", False),
    "held-out rows": (f"{{{DATA}, eval_rows: 1}}", False),
    "no duplicates": (f"{{{DATA}, deduplicate: true}}", False),
    "findings that are allowed": (f"{{{DATA}, allow: [doubled-bos]}}", False),
    "more processes": ("{train: [{path: rows.jsonl}], cache: kept, workers: 2}", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_token_is_a_part_of_the_key_and_nothing_else_is(change, workspace, encoded):
    data, again = CHANGES[change]
    workspace.write("rows.jsonl", [{**conversation(str(i)), "id": i} for i in range(4)])
    workspace.examples(f"{{{DATA}}}")
    before = encoded["rows"]
    workspace.examples(data)
    assert (encoded["rows"] > before) is again


def test_the_template_and_the_content_are_parts_of_the_key_the_path_is_not(workspace, encoded, tokenizer_of):
    rows = [conversation(str(i)) for i in range(4)]
    workspace.write("rows.jsonl", rows)
    workspace.examples(f"{{{DATA}}}")
    workspace.write("moved.jsonl", rows)
    moved = workspace.examples("{train: [{path: moved.jsonl}], cache: kept}")
    assert encoded["rows"] == 4
    assert moved.describe(0) == "moved.jsonl:1"
    workspace.write("rows.jsonl", [*rows, conversation("more")])
    assert len(workspace.examples(f"{{{DATA}}}")) == 5
    assert encoded["rows"] == 9
    workspace.tokenizer = tokenizer_of("llama3")
    workspace.examples(f"{{{DATA}}}")
    assert encoded["rows"] == 14


def test_a_new_file_makes_no_other_be_tokenized_again(workspace, encoded):
    workspace.write("a.jsonl", [conversation("a")] * 5)
    workspace.examples("{train: [{path: '*.jsonl'}], cache: kept}")
    workspace.write("b.jsonl", [conversation("b")] * 2)
    assert len(workspace.examples("{train: [{path: '*.jsonl'}], cache: kept}")) == 7
    assert encoded["rows"] == 7


def test_content_decides_even_if_size_and_time_are_as_before(workspace):
    path = workspace.write("rows.jsonl", [conversation("four")])
    workspace.examples(f"{{{DATA}}}")
    stat = path.stat()
    workspace.write("rows.jsonl", [conversation("five")])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert workspace.words(workspace.examples(f"{{{DATA}}}")) == ["five<|im_end|>"]


def test_digests_of_large_settled_files_are_remembered(tmp_path, monkeypatch):
    path, memo = tmp_path / "large.bin", DigestMemo(tmp_path / "cache")
    path.write_bytes(os.urandom(2 << 20))
    os.utime(path, (time.time() - 60,) * 2)
    first = memo.digest(path)
    monkeypatch.setattr("pegbox_data.files._digest", lambda _: pytest.fail("read again"))
    assert memo.digest(path) == first
    monkeypatch.undo()
    path.write_bytes(os.urandom(2 << 20))
    assert memo.digest(path) != first


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "no description"])
def test_damaged_rows_are_made_again_with_a_note(damage, workspace, caplog):
    caplog.set_level("INFO", logger="pegbox")
    workspace.write("rows.jsonl", [conversation(str(i)) for i in range(20)])
    before = content(workspace.examples(f"{{{DATA}}}"))
    (ids,) = workspace.folder.glob("kept/pieces/*/*/ids.bin")
    if damage == "cut":
        ids.write_bytes(ids.read_bytes()[:-4])
    elif damage == "changed":
        ids.write_bytes(b"\x07" + ids.read_bytes()[1:])
    elif damage == "missing":
        ids.unlink()
    else:
        (ids.parent / "piece.json").write_text("{")
    assert content(workspace.examples(f"{{{DATA}}}")) == before
    assert "damaged and were made again" in caplog.text


def test_small_files_are_not_kept_unless_a_folder_is_named(workspace):
    workspace.write("rows.jsonl", [conversation("a")])
    workspace.examples("{train: [{path: rows.jsonl}]}")
    assert not (workspace.folder / "user-cache").exists()
    workspace.write("rows.jsonl", [conversation("a" * 3000)] * 400)
    workspace.examples("{train: [{path: rows.jsonl}]}")
    assert list((workspace.folder / "user-cache" / "pegbox" / "data" / "pieces").glob("*/*/piece.json"))


def test_a_failed_build_leaves_nothing(workspace):
    workspace.write("rows.jsonl", [conversation("a")] * 300 + ["bad"])
    with pytest.raises(Exception, match=r"rows\.jsonl:301"):
        workspace.examples(f"{{{DATA}}}")
    assert [path.name for path in workspace.folder.glob("kept/pieces/*/*") if path.suffix != ".lock"] == []


def _build(workspace, queue):
    counted = []
    original = Encoder.encode
    Encoder.encode = lambda self, rows: (counted.append(len(rows)), time.sleep(0.05), original(self, rows))[2]
    examples = workspace.examples("{train: [{path: rows.jsonl}], cache: kept, workers: 1}")
    queue.put((sum(counted), [examples[i].input_ids.tolist() for i in range(len(examples))]))


def test_of_two_runs_that_start_at_once_one_tokenizes(workspace):
    workspace.write("rows.jsonl", [conversation(str(i)) for i in range(1000)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build, args=(workspace, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in results) == [0, 1000]
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_processes_changes_nothing(workers, workspace, monkeypatch):
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 16)
    monkeypatch.setattr("pegbox_data.loading.ALONE", 2)
    rows = [{**conversation("x " * (i % 17)), "id": i} for i in range(400)]
    workspace.write("rows.jsonl", rows)
    data = "{train: [{path: rows.jsonl}], columns: [id], cache: off, workers: %d}"
    one, several = (workspace.examples(data % count) for count in (1, workers))
    assert content(one) == content(several)
    assert one.fingerprint == several.fingerprint
    rows[390]["messages"] = []
    workspace.write("rows.jsonl", rows)
    with pytest.raises(Exception, match=r"rows\.jsonl:391: 'messages' is empty"):
        workspace.examples(data % workers)


def test_kept_rows_are_mapped_not_read(workspace):
    workspace.write("rows.jsonl", [conversation(str(i)) for i in range(50)])
    examples = workspace.examples(f"{{{DATA}}}")
    assert all(isinstance(piece.ids, np.memmap) for piece in examples._pieces)


def test_building_ahead_keeps_what_a_run_needs(workspace, encoded, monkeypatch):
    from pegbox import hooks
    from pegbox.hooks import hookimpl
    from pegbox_data.building import build_for

    class Tokenizing:
        @hookimpl
        def load_processor(self, ctx):
            from pegbox.types import Processor

            return Processor(tokenizer=workspace.tokenizer, pad_id=0, fingerprint="tiny")

    workspace.write("rows.jsonl", [conversation(str(i)) for i in range(30)])
    workspace.write("eval.jsonl", [conversation("e")])
    data = "{train: [{path: rows.jsonl}], eval: [{path: eval.jsonl}], cache: kept}"
    built = build_for(workspace.context(data, {"tokenizing": Tokenizing()}))
    assert built.bytes > 0
    assert any("train: 30 rows" in line for line in built.lines)
    assert str(workspace.folder / "kept") in str(built)
    assert encoded["rows"] == 31
    ctx = workspace.context(data, {"tokenizing": Tokenizing()})
    processor = ctx.call(hooks.load_processor, ctx)
    assert len(ctx.call(hooks.build_dataset, ctx, processor, "train")) == 30
    assert encoded["rows"] == 31
    assert json.loads(next(workspace.folder.glob("kept/pieces/*/*/piece.json")).read_text())["read"] in (1, 30)
