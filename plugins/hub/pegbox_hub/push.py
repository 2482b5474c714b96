"""Login, and the push itself, by huggingface_hub.

Checkpoints are never pushed: they hold optimizer state, and everything that a run can be resumed from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import ConfigError, RunError, UserError

if TYPE_CHECKING:
    from pathlib import Path

    from huggingface_hub import HfApi

    from pegbox_hub.config import HubConfig

NEVER = ("checkpoints/*", "*.pt", "*.pth", "*optimizer*", ".*", "*/.*", "*.tmp")
RECORD = ("config.yaml", "run.json", "metrics.jsonl", "samples/*")


def require_login(config: HubConfig) -> None:
    """Raise unless somebody is logged in who may write to the repository's owner.

    Raises:
        UserError: nobody is, the hub does not answer, or the token is not valid.
        ConfigError: the repository belongs to somebody else.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if not get_token():
        raise UserError(
            f"hub.repo is '{config.repo}', but nobody is logged in",
            "The run would end and could not be pushed.",
            "Type: hf auth login    (or set HF_TOKEN), or remove hub from plugins.",
        )
    try:
        account = _api(config).whoami()
    except OfflineModeIsEnabled as error:
        raise UserError(
            f"hub.repo is '{config.repo}', but huggingface_hub is offline (HF_HUB_OFFLINE)",
            "The run would end and could not be pushed.",
            "Unset HF_HUB_OFFLINE, or remove hub from plugins.",
        ) from error
    except HfHubHTTPError as error:
        raise UserError(
            f"the hub does not accept the login: {str(error).splitlines()[0]}",
            "A token may have expired, or be for another hub.",
            "Type: hf auth login",
        ) from error
    except OSError as error:
        raise _no_answer(config, error) from error
    except Exception as error:
        # The library lets errors of its HTTP client through, which are of another hierarchy.
        if type(error).__module__.split(".")[0] not in ("httpx", "httpcore"):
            raise
        raise _no_answer(config, error) from error
    owner = config.repo.split("/")[0]
    owners = [account["name"], *(organization["name"] for organization in account.get("orgs", []))]
    if owner not in owners:
        raise ConfigError(
            f"hub.repo is '{config.repo}', but {account['name']} cannot write to '{owner}'",
            f"The login belongs to: {', '.join(owners)}.",
            f"Set hub.repo to {account['name']}/{config.repo.split('/')[1]}, or log in as somebody else.",
        )


def push(config: HubConfig, folder: Path, step: int) -> str:
    """Push the exported model; returns its address.

    Raises:
        RunError: the push failed; the run's folder is complete.
    """
    api = _api(config)
    try:
        address = api.create_repo(config.repo, private=config.private, exist_ok=True)
        if config.revision is not None:
            api.create_branch(config.repo, branch=config.revision, exist_ok=True)
        api.upload_folder(
            repo_id=config.repo,
            folder_path=folder,
            revision=config.revision,
            ignore_patterns=[*NEVER, *(() if config.record else RECORD)],
            commit_message=f"Pegbox run, step {step}",
        )
    except Exception as error:
        raise RunError(
            f"the push to {config.repo} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            f"Training is done, and {folder} is complete.",
            f"Type: hf upload {config.repo} {folder} . --exclude 'checkpoints/*'",
        ) from error
    return str(address)


def _no_answer(config: HubConfig, error: Exception) -> UserError:
    return UserError(
        f"the hub does not answer{f' at {config.endpoint}' if config.endpoint else ''}: {error}",
        "The run would end and could not be pushed.",
        "Look at the network and at hub.endpoint, or remove hub from plugins.",
    )


def _api(config: HubConfig) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=config.endpoint, library_name="pegbox")
