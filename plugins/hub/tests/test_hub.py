"""A run is pushed to a hub on this machine; everything that would fail later fails first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pegbox.errors import ConfigError, RunError, UserError
from pegbox.plan import compose
from pegbox.run import execute
from pegbox_hub.config import HubConfig
from pegbox_hub.push import push, require_login

TINY = str(Path(__file__).parents[2] / "trainer" / "tests" / "tiny_llama.py")


def run(folder: Path, endpoint: str, **settings: Any) -> None:
    config = {
        "model": {"name": "tiny"},
        "plugins": [TINY, "sft", "adamw", "trainer", "hub"],
        "tiny_llama": {"rows": 8},
        "trainer": {"progress": "none", "max_steps": 1, "device": "cpu"},
        "hub": {"repo": "me/model", "endpoint": endpoint, **settings},
        "output": str(folder),
    }
    execute(compose(config))


def test_what_was_exported_arrives_and_checkpoints_and_record_do_not(hub: Any, tmp_path: Path) -> None:
    run(tmp_path / "run", hub.address)
    arrived = {path for repo, branch, path in hub.files if (repo, branch) == ("me/model", "main")}
    assert arrived == {"model.safetensors", "config.json", "generation_config.json"}
    assert hub.files["me/model", "main", "model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/optimizer.pt"))
    (created,) = hub.created
    assert created["name"] == "model"
    assert created.get("private") is True or created.get("visibility") == "private"


def test_the_record_a_branch_and_a_public_repository_if_asked_for(hub: Any, tmp_path: Path) -> None:
    run(tmp_path / "run", hub.address, record=True, revision="second", private=False)
    arrived = {path for repo, branch, path in hub.files if branch == "second"}
    assert {"config.yaml", "run.json", "metrics.jsonl", "model.safetensors"} <= arrived
    assert not any("optimizer" in path or path.startswith("checkpoints") for path in arrived)
    assert hub.branches == ["second"]
    assert hub.created[0].get("private") in (False, None)


def test_optimizer_state_is_not_pushed_wherever_it_lies(hub: Any, tmp_path: Path) -> None:
    for name in (
        "model.safetensors",
        "optimizer.safetensors",
        "deep/optimizer.pt",
        "checkpoints/step-1/x.json",
        ".cache",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    push(HubConfig(repo="me/model", endpoint=hub.address), tmp_path, 1)
    assert {path for _, _, path in hub.files} == {"model.safetensors"}


def test_the_login_is_checked_before_anything_is_loaded(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(UserError, match="does not accept the login"):
        run(tmp_path / "run", hub.address)
    assert hub.requests == ["GET /api/whoami-v2"]
    assert not (tmp_path / "run" / "run.json").exists()


def test_nobody_logged_in_is_an_error(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        require_login(HubConfig(repo="me/model", endpoint=hub.address))
    assert hub.requests == []


def test_another_owners_repository_is_refused_and_an_organizations_is_not(hub: Any) -> None:
    require_login(HubConfig(repo="us/model", endpoint=hub.address))
    with pytest.raises(ConfigError, match=r"Set hub\.repo to me/model"):
        require_login(HubConfig(repo="them/model", endpoint=hub.address))


def test_a_hub_that_does_not_answer_is_an_error(hub: Any) -> None:
    with pytest.raises(UserError, match="does not answer"):
        require_login(HubConfig(repo="me/model", endpoint="http://127.0.0.1:9"))


def test_offline_mode_is_an_error(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="Unset HF_HUB_OFFLINE"):
        require_login(HubConfig(repo="me/model", endpoint=hub.address))


def test_a_push_that_fails_says_that_the_run_is_complete(hub: Any, tmp_path: Path) -> None:
    hub.refuse_commits = True
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="is complete") as raised:
        push(HubConfig(repo="me/model", endpoint=hub.address), tmp_path, 1)
    assert "hf upload me/model" in raised.value.next


@pytest.mark.parametrize("settings", [{}, {"repo": "model"}, {"repo": "me/model", "endpoint": "hub"}])
def test_a_repository_has_an_owner_and_a_name(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        compose({"model": {"name": "tiny"}, "plugins": ["hub"], "hub": settings})
