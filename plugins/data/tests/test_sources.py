"""The same rows from every kind of file, each with the line it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from pegbox.errors import ConfigError, DataError

PAIRS = [("What is 2+2?", "four"), ('Say: "hi", then go', "hi\nand gone"), ("日本", "ünïcödé 🙂")]
ROWS = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]


def as_csv() -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["prompt", "completion"])
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


FILES = {
    "rows.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS), [1, 2, 3]),
    "blank-lines.ndjson": ("\ufeff\n" + "\n\n".join(json.dumps(row) for row in ROWS), [2, 4, 6]),
    "rows.json": (json.dumps(ROWS), [1, 1, 1]),
    "indented.json": (json.dumps(ROWS, indent=2), [2, 6, 10]),
    "rows.csv": (as_csv(), [2, 3, 5]),
    "rows.parquet": (as_parquet(), [1, 2, 3]),
    "UPPER.JSONL": ("".join(json.dumps(row) + "\r\n" for row in ROWS), [1, 2, 3]),
}


@pytest.mark.parametrize("name", FILES)
def test_every_source_gives_the_same_rows_and_their_lines(name, workspace):
    content, lines = FILES[name]
    workspace.write(name, content)
    examples = workspace.examples(f"{{train: [{{path: {name}, format: completion}}]}}")
    assert workspace.words(examples) == [f"{completion}<|im_end|>" for _, completion in PAIRS]
    assert [examples.describe(i) for i in range(3)] == [f"{name}:{line}" for line in lines]


def test_a_named_source_reads_a_file_of_any_suffix(workspace):
    workspace.write("rows.txt", ROWS)
    examples = workspace.examples("{train: [{path: rows.txt, format: completion, source: jsonl}]}")
    assert len(examples) == 3


def test_messages_may_be_a_json_string(workspace):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    workspace.write("rows.csv", 'messages\n"' + json.dumps(messages).replace('"', '""') + '"\n')
    assert workspace.words(workspace.examples("{train: [{path: rows.csv}]}")) == ["b<|im_end|>"]


def test_nested_parquet_rows_are_conversations(workspace):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": messages}] * 3000), workspace.folder / "rows.parquet"
    )
    examples = workspace.examples("{train: [{path: rows.parquet}]}")
    assert len(examples) == 3000
    assert examples.describe(2999) == "rows.parquet:3000"
    assert workspace.words(examples)[-1] == "b<|im_end|>"


def test_fields_of_other_layouts_are_mapped(workspace):
    turn = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    workspace.write("sharegpt.jsonl", [{"conversations": turn, "id": 7}])
    examples = workspace.examples(
        "{train: [{path: sharegpt.jsonl, fields: {messages: conversations, role: from, content: value}, "
        "options: {roles: {human: user, gpt: assistant}}}]}"
    )
    assert workspace.words(examples) == ["b<|im_end|>"]


def test_limit_takes_the_first_rows(workspace):
    workspace.write("rows.jsonl", [*ROWS[:2], "never read"])
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion, limit: 2}]}")
    assert len(examples) == 2


def test_files_follow_one_another_in_the_order_of_the_config(workspace):
    workspace.write("a.jsonl", ROWS[:1])
    workspace.write("b.jsonl", ROWS[1:])
    examples = workspace.examples("{train: [{path: b.jsonl, format: completion}, {path: a.jsonl, format: completion}]}")
    assert [examples.describe(i) for i in range(3)] == ["b.jsonl:1", "b.jsonl:2", "a.jsonl:1"]


def test_paths_start_at_the_folder_of_the_config(workspace, tmp_path_factory, monkeypatch):
    workspace.write("rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    examples = workspace.examples("{train: [{path: rows.jsonl, format: completion}]}")
    assert examples.describe(0) == f"{workspace.folder}/rows.jsonl:1"


def as_arrow_stream() -> bytes:
    table = pyarrow.Table.from_pylist(ROWS)
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_arrow_file() -> bytes:
    table = pyarrow.Table.from_pylist(ROWS)
    sink = io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
MORE = {
    "rows.arrow": as_arrow_stream(),
    "rows.feather": as_arrow_file(),
    "rows.tsv": as_csv().replace(",", "\t").replace("then\tgo", "then, go").encode(),
    "rows.jsonl.gz": gzip.compress(JSONL),
    "rows.jsonl.zst": pyarrow.compress(JSONL, codec="zstd", asbytes=True),
    "rows.parquet.gz": gzip.compress(as_parquet()),
}


@pytest.mark.parametrize("name", MORE)
def test_arrow_and_compressed_files_give_the_same_rows(name, workspace):
    workspace.write(name, MORE[name])
    examples = workspace.examples(f"{{train: [{{path: {name}, format: completion}}]}}")
    assert workspace.words(examples) == [f"{completion}<|im_end|>" for _, completion in PAIRS]


@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_reading_goes_on_behind_any_row(name, workspace):
    from pegbox_data.declared import imported
    from pegbox_data.files import DataFile
    from pegbox_data.sources import START

    content = FILES[name][0] if name in FILES else MORE[name]
    file = DataFile(str(workspace.write(name, content)), name)
    items = workspace.context(f"{{train: [{{path: {name}}}]}}").items("source").values()
    readers = [imported(item) for item in items]
    source = next(one for one in readers if file.plain_name.endswith(getattr(one, "suffixes", ("?",))))
    rows = list(source.read(file, source.options(), START))
    assert len(rows) == 3
    for index, row in enumerate(rows):
        rest = list(source.read(file, source.options(), row.behind))
        assert [(one.line, one.row) for one in rest] == [(one.line, one.row) for one in rows[index + 1 :]]


def test_text_has_a_row_for_each_line_or_each_file(workspace):
    workspace.write("a.txt", "Hello world.\n\nfour\n")
    entry = "path: a.txt, format: completion, fields: {prompt: '', completion: text}, options: {chat_template: false}"
    lines = workspace.examples(f"{{train: [{{{entry}}}]}}")
    assert workspace.words(lines) == ["Hello world.</s>", "four</s>"]
    assert lines.describe(1) == "a.txt:3"
    whole = workspace.examples(f"{{train: [{{{entry}, source: text, source_options: {{rows: file}}}}]}}")
    assert workspace.words(whole) == ["Hello world.\n\nfour\n</s>"]


def test_folders_globs_and_lists_name_several_files(workspace):
    (workspace.folder / "parts").mkdir()
    for index, row in enumerate(ROWS):
        workspace.write(f"parts/train-{index}.jsonl", [row])
    workspace.write("parts/test-0.jsonl", [ROWS[0]])
    workspace.write("parts/README.md.off", "no data")
    names = [f"parts/train-{index}.jsonl:1" for index in range(3)]
    for path in ("parts/train-*.jsonl", "[parts/train-0.jsonl, 'parts/train-[12].jsonl']"):
        examples = workspace.examples(f"{{train: [{{path: {path}, format: completion}}]}}")
        assert [examples.describe(i) for i in range(3)] == names
    folder = workspace.examples("{train: [{path: parts, format: completion}]}")
    assert [folder.describe(i) for i in range(4)] == ["parts/test-0.jsonl:1", *names]
    split = workspace.examples("{train: [{path: parts, split: train, format: completion}]}")
    assert [split.describe(i) for i in range(3)] == names
    with pytest.raises(ConfigError, match="has no split 'valid'"):
        workspace.examples("{train: [{path: parts, split: valid, format: completion}]}")


@pytest.mark.parametrize(
    ("split", "rows"),
    [("train[2:5]", [2, 3, 4]), ("[:30%]", [0, 1, 2]), ("[80%:]", [8, 9]), ("[-1:]", [9]), ("train[4:-5]", [4])],
)
def test_slices_are_those_of_the_datasets_library(split, rows, workspace):
    from datasets import load_dataset

    path = workspace.write("rows.jsonl", [{"prompt": "n", "completion": str(i)} for i in range(10)])
    examples = workspace.examples({"train": [{"path": "rows.jsonl", "format": "completion", "split": split}]})
    assert workspace.words(examples) == [f"{i}<|im_end|>" for i in rows]
    written = split if split.startswith("train") else f"train{split}"
    theirs = load_dataset("json", data_files=str(path), split=written, cache_dir=str(workspace.folder / "hf"))
    assert theirs["completion"] == [str(i) for i in rows]


def test_a_slice_reaches_over_several_files(workspace):
    for name in "abc":
        workspace.write(f"{name}.jsonl", [{"prompt": "n", "completion": f"{name}{i}"} for i in range(4)])
    entry = {"path": ["a.jsonl", "b.jsonl", "c.jsonl"], "format": "completion"}
    for split, limit in (("[3:9]", None), ("[25%:75%]", None), ("[3:]", 6)):
        examples = workspace.examples({"train": [{**entry, "split": split, "limit": limit}]})
        words = [word.removesuffix("<|im_end|>") for word in workspace.words(examples)]
        assert words == [f"{name}{i}" for name in "abc" for i in range(4)][3:9]


def test_saved_and_hub_datasets_come_through_the_datasets_library(workspace):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk("saved")
    Dataset.from_list(ROWS).save_to_disk("single")
    (workspace.folder / "repository").mkdir()
    workspace.write("repository/train.jsonl", ROWS)
    entries = {
        "{path: saved, format: completion}": 3,
        "{path: saved, split: test, format: completion}": 1,
        "{path: saved, split: 'train[1:]', format: completion}": 2,
        "{path: single, format: completion}": 3,
        "{path: ./repository, source: hub, split: 'train[:67%]', format: completion}": 2,
        "{path: ./repository, source: hub, split: '[1:]', format: completion}": 2,
    }
    for entry, count in entries.items():
        assert len(workspace.examples(f"{{train: [{entry}], cache: off}}")) == count, entry
    for folder in ("saved", "single"):
        with pytest.raises(DataError, match=f"{folder} has no split 'valid'"):
            workspace.examples(f"{{train: [{{path: {folder}, split: valid}}]}}")


def test_a_hub_dataset_that_cannot_be_reached_says_what_was_tried(workspace, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as raised:
        workspace.examples("{train: [{path: nobody/nothing, split: 'train[:10%]', revision: v2}]}")
    assert "'nobody/nothing' cannot be opened" in raised.value.what
    for word in ("local file or folder", "hub", "switched off", "train[:10%]", "v2"):
        assert word in raised.value.why


def test_the_datasets_library_is_imported_only_when_it_is_needed(workspace):
    import subprocess
    import sys

    workspace.write("rows.jsonl", ROWS)
    code = (
        "import sys; from pegbox.plan import compose; "
        "compose({'model': {'name': 'x'}, 'plugins': ['data'], 'output': 'run', 'data': {'train': "
        "[{'path': 'rows.jsonl', 'options': {'turns': 'last'}}]}}); "
        "print([name for name in ('datasets', 'torch', 'transformers', 'pyarrow', 'fsspec') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_addresses_are_read_through_fsspec(workspace):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/a.jsonl": JSONL, "/bucket/b.jsonl.gz": gzip.compress(JSONL), "/bucket/notes.bin": b"x"})
    try:
        for path, count in (("memory://bucket/a.jsonl", 3), ("memory://bucket/*.jsonl*", 6), ("memory://bucket", 6)):
            examples = workspace.examples(f"{{train: [{{path: '{path}', format: completion}}]}}")
            assert len(examples) == count
            assert examples.describe(0) == "memory:///bucket/a.jsonl:1"
        with pytest.raises(DataError, match="names no file"):
            workspace.examples("{train: [{path: 'memory://bucket/none.jsonl'}]}")
    finally:
        memory.rm("/bucket", recursive=True)


def test_files_are_read_over_http(workspace):
    import functools
    import http.server
    import threading

    workspace.write("rows.jsonl", ROWS)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(workspace.folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        examples = workspace.examples(f"{{train: [{{path: '{address}/rows.jsonl', format: completion}}]}}")
        assert workspace.words(examples) == [f"{completion}<|im_end|>" for _, completion in PAIRS]
        with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
            workspace.examples(f"{{train: [{{path: '{address}/none.jsonl', format: completion}}]}}")
    finally:
        server.shutdown()


@pytest.mark.parametrize(("address", "extra"), [("s3://bucket/a.jsonl", "s3"), ("az://bucket/a.jsonl", "az")])
def test_a_missing_library_for_an_address_is_named(address, extra, workspace, monkeypatch):
    import sys

    for library in ("s3fs", "adlfs"):
        monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError) as raised:
        workspace.examples(f"{{train: [{{path: '{address}'}}]}}")
    assert f"pip install 'pegbox-data[{extra}]'" in raised.value.next


def test_synthetic_rows_are_the_same_everywhere_and_as_long_as_asked(workspace):
    entry = {"source": "synthetic", "source_options": {"rows": 200, "words": 30, "turns": 2, "seed": 3}}
    first, again = (workspace.examples({"train": [entry], "cache": "off"}) for _ in range(2))
    assert len(first) == 200
    assert [first[i].input_ids.tolist() for i in range(200)] == [again[i].input_ids.tolist() for i in range(200)]
    other = {**entry, "source_options": {**entry["source_options"], "seed": 4}}
    assert workspace.examples({"train": [other], "cache": "off"})[0].input_ids.tolist() != first[0].input_ids.tolist()
    part = workspace.examples({"train": [{**entry, "split": "[50:60]"}], "cache": "off"})
    assert [part[i].input_ids.tolist() for i in range(10)] == [first[i].input_ids.tolist() for i in range(50, 60)]


def test_synthetic_lengths_have_the_mean_and_the_words_that_were_asked():
    from pegbox_data.synthetic import SyntheticOptions, row, vocabulary

    for lengths in ("fixed", "uniform", "lognormal"):
        options = SyntheticOptions(rows=2000, words=90, turns=1, lengths=lengths, vocabulary=500)
        words = vocabulary(500)
        assert len(set(words)) == 500
        texts = [row(options, words, number)["text"].split() for number in range(1, 2001)]
        mean = sum(map(len, texts)) / len(texts)
        assert mean == pytest.approx(90, rel=0.04), lengths
        assert {word.lower().strip(".") for text in texts for word in text} == set(words)
