"""What is seen to be wrong before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, DataError, PluginError, did_you_mean
from pegbox.rollouts import RolloutBatch
from pegbox.rows import UNTRAINED, Example, ExampleStream

from pegbox_grpo.importing import user_function
from pegbox_grpo.names import REFERENCE_LOGPS

NAME, EVAL_LOSS = "grpo", "eval_loss"

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import Dataset
    from pegbox.types import Model

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
            "Add reward-functions or reward-model to plugins, or a plugin of your own with score_rollouts.",
        )
    for plugin, section in ctx.config.sections.items():
        for key in ("best", "metric"):
            if getattr(section, key, None) == EVAL_LOSS:
                raise ConfigError(
                    f"{plugin}.{key} is {EVAL_LOSS}, which says nothing of an online run",
                    "Its loss compares completions with one another; held-out ones are told apart by their rewards.",
                    f"Set {plugin}.{key} to eval_reward, of which the highest is the best.",
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


def refuse_rows(ctx: Context, config: GrpoConfig, rows: Dataset) -> None:
    """Raise if rows are no prompts, or if the config weighs rewards that nobody gives; no model is needed for either.

    Raises:
        DataError: the first row has trained tokens. Later ones are looked at when they are sampled from.
        ConfigError: `rewards` weighs a name that no scorer says when it is asked about no completions.
    """
    if not isinstance(rows, ExampleStream) and len(rows):
        require_prompt(rows[0], lambda: rows.describe(0))
    if ctx.config.run.rewards:
        asked = len(ctx.kernel.implementations(hooks.score_rollouts.__name__))
        given = ctx.each(hooks.score_rollouts, ctx, RolloutBatch(rollouts=(), samples=config.samples))
        # One that names nothing without completions may do so with them: then the first scores are compared.
        if len([scores for _, scores in given if scores]) == asked:
            require_given(ctx, [score.name for _, scores in given for score in scores])


def refuse_lengths(model: Model, rows: Dataset, config: GrpoConfig) -> None:
    """Raise ConfigError if the longest prompt and its completion are more than the model reads, where it says so."""
    text_config = getattr(getattr(model.module, "config", None), "get_text_config", lambda: None)()
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is None or isinstance(rows, ExampleStream):
        return
    # Rotary scaling stretches the positions of pretraining, and leaves what the config says of them as it was.
    rope = getattr(text_config, "rope_parameters", None) or {}
    for one in [inner for inner in rope.values() if isinstance(inner, Mapping)] or [rope]:
        limit = max(limit, int((one.get("original_max_position_embeddings") or limit) * (one.get("factor") or 1)))
    known = getattr(rows, "lengths", None)
    longest = max((len(rows[at].input_ids) for at in range(len(rows))) if known is None else map(int, known), default=0)
    if longest + config.max_completion_length > limit:
        raise ConfigError(
            f"the longest prompt has {longest:,} tokens and grpo.max_completion_length is "
            f"{config.max_completion_length:,}, but {model.name} reads {limit:,}",
            "Beyond that it was not trained, and some models fail there.",
            f"Set grpo.max_completion_length to {max(1, limit - longest):,} or less, or data.max_length lower.",
        )


def require_prompt(example: Example, describe: Callable[[], str]) -> None:
    """Raise DataError if a row is empty or has trained tokens."""
    empty = len(example.input_ids) == 0
    if empty or any(label != UNTRAINED for label in example.labels):
        raise DataError(
            f"{describe()} {'has no token' if empty else 'has trained tokens'}",
            "Of a row of an online method all tokens are a prompt, and what follows is sampled.",
            "Give the data the format prompts.",
        )


def require_given(ctx: Context, names: Sequence[str]) -> None:
    """Raise ConfigError if the config weighs a reward that is none of `names`, or all of them by 0."""
    weights = ctx.config.run.rewards
    for name in weights:
        if name not in names:
            raise ConfigError(
                f"rewards weighs '{name}' ({ctx.config.layer.origin(('rewards', name))}), and no plugin gives a "
                "reward of that name",
                did_you_mean(name, names, "Rewards of this run:"),
                "Correct the name, or add the plugin that gives it.",
            )
    if not any(weights.get(name, 1.0) for name in names):
        raise ConfigError(
            f"rewards weighs {' and '.join(repr(name) for name in names)} by 0",
            "All completions would be worth the same, and nothing would be learnt.",
            "Give one of them a weight; one that is weighed by 0 beside others is logged only.",
        )
