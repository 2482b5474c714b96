"""What cannot be is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import ConfigError, UserError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import UNTRAINED, Example
from pegbox.run import execute
from reference_rows import Rows, Tiny, Watcher, config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"how": "adapter", "model": "x"}, "how is adapter and model is set"),
        ({"how": "adapter", "dtype": "bfloat16"}, "there is no second model"),
        ({"revision": "main"}, "revision is set and model is not"),
        ({"how": "precomputed", "dtype": "bfloat16"}, "the policy itself computes"),
        ({"how": "precomputed", "sync_every": 3}, "only a copy can follow the policy"),
        ({"how": "adapter", "sync_every": 3}, "only a copy can follow the policy"),
        ({"mixup": 0.5}, "the reference would never move"),
    ],
)
def test_settings_that_do_not_fit(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose({"model": {"name": "tiny"}, "plugins": ["reference"], "reference": section})


class Stream:
    """Rows that have no number."""

    split, fingerprint = "train", "stream"

    def take(self, rows: int) -> Rows:
        return Rows(range(rows))

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Nothing."""


class Streaming(Tiny):
    """Brings a stream."""

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return Stream() if split == "train" else None


@pytest.mark.parametrize(
    ("plugins", "section", "message"),
    [
        ([], {"how": "adapter"}, "no plugin applies one"),
        (["lora", "relora"], {"how": "adapter"}, "relora merges the adapter"),
        (["lora"], {"sync_every": 2}, "the reference has no adapter"),
    ],
)
def test_plugins_that_do_not_fit(plugins: list[str], section: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny, sections = Tiny(), {"relora": {"every": 2, "warmup_steps": 1}} if "relora" in plugins else {}
    plan = config(tmp_path, *plugins, "watcher", "reference", reference=section, **sections)
    with pytest.raises(ConfigError, match=message):
        execute(compose(plan, instances={"tiny": tiny, "watcher": Watcher()}))
    assert not tiny.loaded
    assert not (tmp_path / "run").exists()


class Wraps:
    """Wraps `build_batches`, as methods that make rows during the run do."""

    @hookimpl(wrapper=True)
    def build_batches(self) -> Any:
        return (yield)


def test_batches_made_after_the_reference_cannot_be_precomputed(tmp_path: Path) -> None:
    tiny, section = Tiny(), {"how": "precomputed", "cache": str(tmp_path / "cache")}
    instances = {"tiny": tiny, "watcher": Watcher(), "wraps": Wraps()}
    plan = config(tmp_path, "watcher", "reference", "wraps", reference=section)
    with pytest.raises(ConfigError, match="wraps, which is listed after reference"):
        execute(compose(plan, instances=instances))
    assert not tiny.loaded
    execute(compose(config(tmp_path, "watcher", "wraps", "reference", reference=section), instances=instances))


def test_a_stream_has_no_rows_that_could_be_found_again(tmp_path: Path) -> None:
    tiny = Streaming()
    plan = config(tmp_path, "watcher", "reference", reference={"how": "precomputed"})
    with pytest.raises(ConfigError, match="are a stream"):
        execute(compose(plan, instances={"tiny": tiny, "watcher": Watcher()}))
    assert not tiny.loaded


def test_a_stream_may_be_computed_as_it_comes(tmp_path: Path) -> None:
    watcher, plan = Watcher(), config(tmp_path, "watcher", "reference")
    execute(compose(plan, instances={"tiny": Streaming(), "watcher": watcher}))
    assert len(watcher.steps) == 4


class Prompting(Tiny):
    """Brings prompts, whose answers are to be made."""

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return Prompts(range(10)) if split == "train" else None


class Prompts(Rows):
    """Rows without a trained token."""

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return replace(example, labels=[UNTRAINED] * len(example.labels))


def test_prompts_have_nothing_that_could_be_precomputed(tmp_path: Path) -> None:
    tiny, plan = Prompting(), config(tmp_path, "watcher", "reference", reference={"how": "precomputed"})
    with pytest.raises(ConfigError, match="made during the run"):
        execute(compose(plan, instances={"tiny": tiny, "watcher": Watcher()}))
    assert tiny.forwards == 0


def test_an_adapter_that_cannot_be_switched_off(tmp_path: Path) -> None:
    plan = config(tmp_path, "lora", "watcher", "reference", lora={"init": "olora"}, reference={"how": "adapter"})
    with pytest.raises(ConfigError, match="cannot be switched off"):
        execute(compose(plan, instances={"tiny": Tiny(), "watcher": Watcher()}))


def test_merging_adapters_takes_a_copy(tmp_path: Path) -> None:
    tiny, watcher = Tiny(), Watcher()
    plan = config(tmp_path, "lora", "relora", "watcher", "reference", relora={"every": 2, "warmup_steps": 1})
    execute(compose(plan, instances={"tiny": tiny, "watcher": watcher}))
    assert [model.role for model in tiny.loaded] == ["policy", "reference"]


def test_a_reference_that_is_a_path_to_nothing(tmp_path: Path) -> None:
    tiny = Tiny()
    with pytest.raises(ConfigError, match=r"reference\.model is '\./absent'"):
        execute(
            compose(
                config(tmp_path, "watcher", "reference", reference={"model": "./absent"}),
                instances={"tiny": tiny, "watcher": Watcher()},
            )
        )
    assert not tiny.loaded


def test_a_reference_that_does_not_load_is_named_by_its_key(tmp_path: Path) -> None:
    class Picky(Tiny):
        @hookimpl
        def load_model(self, request: Any) -> Any:
            if request.role == "reference":
                raise UserError("no model 'another'", "The hub cannot be reached.", "Set model.name to a folder.")
            return Tiny.load_model(self, request)

    plan = config(tmp_path, "watcher", "reference", reference={"model": "another"})
    with pytest.raises(ConfigError, match=r"(?s)reference\.model is 'another': no model.*Correct reference\.model"):
        execute(compose(plan, instances={"tiny": Picky(), "watcher": Watcher()}))


def test_a_reference_that_no_loss_compares_with(tmp_path: Path) -> None:
    plan = config(tmp_path, "watcher", "reference", reference={})
    with pytest.raises(ConfigError, match="compares nothing with a reference"):
        execute(compose(plan, instances={"tiny": Tiny(), "watcher": Watcher(frozenset())}))
