"""What is seen to be wrong before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, PluginError

from pegbox_grpo.importing import user_function
from pegbox_grpo.names import REFERENCE_LOGPS

NAME = "grpo"

if TYPE_CHECKING:
    from pegbox.context import Context

    from pegbox_grpo.config import GrpoConfig


def refuse(ctx: Context, config: GrpoConfig) -> None:
    """Raise if nobody makes rollouts, scores them, or gives what the loss needs.

    Raises:
        ConfigError: a plugin is missing.
        PluginError: the engine cannot be given new weights.
    """
    owner = ctx.kernel.owners("generate_rollouts").get("")
    if owner is None and config.rollout_func is None:
        raise ConfigError(
            "grpo has nobody who generates completions",
            "An engine samples them: rollout-hf in this process, rollout-vllm with a server.",
            "Add rollout-hf to plugins, or set grpo.rollout_func to a function of your own.",
        )
    if config.rollout_func is not None:
        user_function(ctx, config.rollout_func)
    if owner is not None and owner not in {i.plugin for i in ctx.kernel.implementations("sync_weights")}:
        raise PluginError(
            f"plugin '{owner}' owns generate_rollouts and does not implement sync_weights",
            "It would go on sampling with the weights that it began with.",
            f"Use another engine, or add sync_weights to {owner}.",
        )
    if not ctx.kernel.implementations(hooks.score_rollouts.__name__):
        raise ConfigError(
            "grpo has nobody who scores completions",
            "Without a reward there is nothing to learn.",
            "Add reward-functions to plugins, or a plugin of your own with score_rollouts.",
        )
    if config.beta > 0 and REFERENCE_LOGPS not in ctx.items("extra"):
        raise ConfigError(
            f"grpo.beta is {config.beta}, and nobody gives reference log-probabilities",
            "The divergence is that of the policy from a reference.",
            "Add reference to plugins, or set grpo.beta to 0.",
        )
    wrappers = [i.plugin for i in ctx.kernel.implementations("build_batches", wrapper=True)]
    if config.kl_placement == "reward" and wrappers[0] == NAME:
        raise ConfigError(
            "grpo.kl_placement is reward, and no plugin before grpo in the list adds to batches",
            "The divergence from the reference is needed before the loss: when rollouts are laid out.",
            "List reference before grpo in plugins.",
        )
