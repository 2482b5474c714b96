"""The section `reference` of a config, and what can be seen to be wrong before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pegbox import hooks
from pegbox.errors import ConfigError
from pegbox.rows import ExampleStream
from pegbox.section import Section, setting
from pydantic import model_validator

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Loss

PLUGIN, MERGES = "reference", "relora"
EXTRA = "reference_logps"
"""What is brought to a batch, and what a loss that wants it says it needs (`Loss.extras`)."""


class ReferenceConfig(Section):
    """Which model the policy is compared with, and how its log-probabilities are had."""

    how: Literal["auto", "adapter", "copy", "precomputed"] = setting(
        "auto",
        "`adapter`: the policy with its adapter switched off; `copy`: a second, frozen model; `precomputed`: one pass "
        "over the data before training, kept on disk; `auto` switches the adapter off where there is one, else copies.",
    )
    model: str | None = setting(
        None, "Name or folder of the reference; not set: the model that the policy starts from.", min_length=1
    )
    revision: str | None = setting(None, "Revision of `model`: a branch, tag or commit.", min_length=1)
    dtype: Literal["policy", "float32", "bfloat16", "float16"] = setting(
        "policy", "Data type of a copy's weights; `policy`: that of the model that is trained."
    )
    sync_every: int | None = setting(
        None, "How often the reference moves towards the policy (TR-DPO); not set: never.", unit="optimizer steps", ge=1
    )
    mixup: float = setting(
        0.6,
        "Alpha of TR-DPO: the reference becomes alpha times the policy and 1 - alpha times itself.",
        unit="1",
        gt=0,
        le=1,
    )
    cache: str = setting(
        "~/.cache/pegbox/reference",
        "Folder that keeps what was precomputed; a relative path starts at the config's folder.",
        min_length=1,
    )

    @model_validator(mode="after")
    def _settings_fit(self) -> ReferenceConfig:
        if self.how == "adapter" and self.model is not None:
            raise ValueError("how is adapter and model is set: the reference would be the policy's own base; use copy")
        if self.how == "adapter" and self.dtype != "policy":
            raise ValueError("how is adapter and dtype is set: there is no second model; remove dtype")
        if self.revision is not None and self.model is None:
            raise ValueError("revision is set and model is not: the policy's own revision is model.revision")
        if self.how == "precomputed" and self.model is None and self.dtype != "policy":
            raise ValueError("how is precomputed and dtype is set: the policy itself computes; set model as well")
        if self.sync_every is not None and self.how in ("adapter", "precomputed"):
            raise ValueError(f"sync_every is set and how is {self.how}: only a copy can follow the policy; use copy")
        if self.sync_every is None and self.mixup != type(self).model_fields["mixup"].default:
            raise ValueError("mixup is set and sync_every is not: the reference would never move")
        return self


def check(ctx: Context, config: ReferenceConfig) -> None:
    """Refuse what the other plugins of the run make impossible.

    Raises:
        ConfigError: naming the setting and the plugin.
    """
    adapted = ctx.owned(hooks.apply_adapters)
    named = config.model or ""
    if named.startswith((".", "/", "~")) and not ctx.config.path(named).exists():
        raise ConfigError(
            f"reference.model is '{named}', and {ctx.config.path(named)} does not exist",
            "A reference is a folder, a file, or a name on the hub.",
            "Correct reference.model; a relative path starts at the config's folder.",
        )
    if config.how == "adapter" and not adapted:
        raise ConfigError(
            "reference.how is adapter, and no plugin applies one",
            "There is nothing to switch off: the whole model is trained.",
            "Set reference.how to copy or precomputed, or add lora to plugins.",
        )
    if config.how == "adapter" and MERGES in ctx.kernel.active:
        raise ConfigError(
            f"reference.how is adapter, and {MERGES} merges the adapter into the weights under it",
            "Switched off it would leave a model that has been trained.",
            "Set reference.how to copy or precomputed.",
        )
    if config.sync_every is not None and adapted:
        raise ConfigError(
            "reference.sync_every is set, and a plugin applies an adapter",
            "Weights of the policy and of its reference are mixed one by one, and the reference has no adapter.",
            "Remove reference.sync_every, or train all weights.",
        )
    wrappers = [found.plugin for found in ctx.kernel.implementations("build_batches", wrapper=True)]
    later = wrappers[wrappers.index(PLUGIN) + 1 :]
    if config.how == "precomputed" and later:
        raise ConfigError(
            f"reference.how is precomputed, and {later[0]}, which is listed after reference, makes batches of its own",
            "Only the rows of the data were there to be computed before training.",
            f"Set reference.how to copy or adapter, or list {later[0]} before reference if it leaves rows as they are.",
        )


def require_indexed(config: ReferenceConfig, rows: Dataset) -> None:
    """Refuse to precompute for rows that have no place.

    Raises:
        ConfigError: the rows are a stream.
    """
    if config.how == "precomputed" and isinstance(rows, ExampleStream):
        raise ConfigError(
            f"reference.how is precomputed, and the rows of the {rows.split} split are a stream",
            "What was computed is found again by the number of a row, and the rows of a stream have none.",
            "Set reference.how to copy or adapter, or let the data section read the files as a whole.",
        )


def require_wanted(loss: Loss) -> None:
    """Refuse to compute for nobody.

    Raises:
        ConfigError: the loss does not say that it needs the reference's log-probabilities.
    """
    if EXTRA not in getattr(loss, "extras", ()):
        raise ConfigError(
            "reference is in plugins, and the loss of this run compares nothing with a reference",
            "Each step would run a model more, and nothing would be done with what it says.",
            "Remove reference from plugins; or give the term that compares a weight, such as grpo.beta=0.04.",
        )
