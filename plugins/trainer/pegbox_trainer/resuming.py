"""A run goes on with the settings it began with: what differs from its record is an error that names it.

Weights, optimizer and schedule come back from the checkpoint, so a changed learning rate would do nothing and a changed
loss would make another run of it. Free are only settings that say how long a run lasts, what is reported and kept, how
a step is split (results do not depend on that), and where things lie.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Checkpoint

FREE = (
    *("output", "resume", "paths_from", "plugins.*", "data.cache", "data.workers", "hf.cache"),
    *(
        f"trainer.{name}"
        for name in ("max_steps", "epochs", "micro_batch", "accumulation", "batch", "eval_micro_batch")
    ),
    *(
        f"trainer.{name}"
        for name in ("log_every", "eval_*", "evals_per_epoch", "save*", "keep", "best*", "gradient_proof*")
    ),
    *(f"trainer.{name}" for name in ("device", "deterministic", "find_unused_parameters", "progress", "stream_window")),
    *(f"{plugin}.*" for plugin in ("trackers", "hub", "samples", "early-stopping", "activations", "compile", "fsdp")),
    *("rollout-hf.batch", "rollout-vllm.*", "reward-functions.workers", "reward-functions.timeout_s"),
    *("use", "use.*"),
)
"""Keys that may differ. The rows of a step and the window of a stream are compared with the place in the data."""
SHOWN = 5


def refuse_changes(ctx: Context, record: Path) -> None:
    """Raise if the config differs from the one in `record`, the run's `run.json`.

    Raises:
        ConfigError: naming each key with its value then and now.
    """
    recorded = json.loads(record.read_text(encoding="utf-8"))["plan"]
    now = ctx.plan.to_json()
    before_values = {entry["key"]: entry["value"] for entry in recorded["config"]}
    now_values = json.loads(json.dumps({entry["key"]: entry["value"] for entry in now["config"]}, default=str))
    defaults = {entry["key"] for entry in now["config"] if entry["from"] == "default"}
    changed = list(_changed(before_values, now_values, defaults))
    changed += _other_plugins(recorded, now)
    if changed:
        more = f"\n- and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            "this run cannot go on: its settings are not those it began with\n- " + "\n- ".join(changed[:SHOWN]) + more,
            "Weights, optimizer and schedule come from the checkpoint; a run with other settings is another run.",
            f"Set them back (see config.yaml in {record.parent}), or start a new run with another output.",
        )


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], defaults: set[str]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *now]):
        new_default = key not in before and key in defaults
        if new_default or before.get(key) == now.get(key) or any(fnmatch.fnmatchcase(key, free) for free in FREE):
            continue
        was, is_ = (repr(values[key]) if key in values else "not set" for values in (before, now))
        yield f"{key} was {was}, is now {is_}"


def _other_plugins(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Plugins that came, went, or have another file, and do more than watch, by the hooks that the two plans give."""
    free = {free.removesuffix(".*") for free in FREE}
    then_acting, now_acting = _acting(before) - free, _acting(now) - free
    yield from (f"the plugin {name} was active, is not now" for name in sorted(then_acting - now_acting))
    yield from (f"the plugin {name} was not active, is now" for name in sorted(now_acting - then_acting))
    then, today = ({part["name"]: part["from"] for part in plan["plugins"]} for plan in (before, now))
    for name in sorted(then_acting & now_acting):
        if today[name].startswith("file ") and today[name] != then[name]:
            yield f"the plugin {name} was {then[name]}, is now {today[name]}"


def _acting(plan: Mapping[str, Any]) -> set[str]:
    jobs = [job for job in plan["hooks"] if job["hook"] not in ("register_config", "register_items", "on_event")]
    return {name for job in jobs for name in (*job["plugins"], *job["wrappers"])}


def how_to_go_on(checkpoint: Checkpoint) -> str:
    """What a run that fails after a checkpoint leaves to go on from, and what to type."""
    return (
        f"the run failed; its checkpoint of step {checkpoint.step:,} is complete ({checkpoint.path}). Correct what the "
        "error names and go on from there: the same command with resume=auto"
    )
