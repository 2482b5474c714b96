"""The Hugging Face hub, without asking it: the cache, the token, and whether a config's model is already here."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from pegbox.config import Config

from pegbox_doctor.machine import why_not_writable
from pegbox_doctor.report import Report

GROUP = "Hub"
HUB_NAME = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(?<!\.gguf)"
LOGIN = "For models that need it, type: hf auth login"


def check_hub(report: Report) -> None:
    """Where downloads are kept, whether that can be written, and whether a token is there."""
    if find_spec("huggingface_hub") is None:
        report.fact(GROUP, "huggingface_hub", "not installed")
        return
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    report.fact(GROUP, "cache", cache)
    report.fact(GROUP, "token", "found" if has_token() else "none")
    report.fact(GROUP, "offline", "yes" if constants.HF_HUB_OFFLINE else "no")
    refused = why_not_writable(cache)
    if refused:
        report.problem(
            f"the cache of the hub, {cache}, cannot be written: {refused}",
            "Models and tokenizers that are downloaded are kept there.",
            "Make it writable, or set HF_HOME to another folder.",
        )


def has_token() -> bool:
    """Whether a token is in the environment or in its file; a file that cannot be read holds none for us."""
    from huggingface_hub import get_token

    try:
        return bool(get_token())
    except OSError:
        return False


def check_model(report: Report, config: Config) -> None:
    """Whether the config's model, if it is the name of a hub repository, can be had."""
    wanted = config.run.model
    is_hub_name = re.fullmatch(HUB_NAME, wanted.name) and not config.path(wanted.name).exists()
    if not is_hub_name or Path(wanted.name).exists() or find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import constants, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(wanted.name, "config.json", revision=wanted.revision), str)
    report.fact(GROUP, "model", f"{wanted.name} ({'in the cache' if cached else 'not in the cache'})")
    if cached:
        return
    if constants.HF_HUB_OFFLINE:
        report.problem(
            f"the model {wanted.name} is not in the cache, and the hub is switched off (HF_HUB_OFFLINE)",
            "It can neither be found here nor be downloaded.",
            "Unset HF_HUB_OFFLINE, or set model.name to a local folder.",
        )
    elif not has_token():
        report.note(f"{wanted.name} will be downloaded without a token", "Gated and private models refuse that.", LOGIN)
