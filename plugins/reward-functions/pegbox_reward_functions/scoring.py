"""From rollouts to scores: what functions are told, who calls them, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pegbox.config import validate
from pegbox.errors import ConfigError, did_you_mean
from pegbox.rollouts import RolloutBatch, Score

from pegbox_reward_functions.columns import require_present
from pegbox_reward_functions.opening import Named, Parameters, declared, is_path, parameters_of
from pegbox_reward_functions.pool import Call, Crew, Given

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import Rollout

    from pegbox_reward_functions.config import RewardEntry, RewardFunctionsConfig


@dataclass(frozen=True)
class OpenedReward:
    """A reward whose function exists."""

    named: Named
    parameters: Parameters


class Scorer:
    """The rewards of a run and the processes that compute them.

    Raises:
        ConfigError: a name, an option or a function is wrong; two scores have one name.
    """

    def __init__(self, ctx: Context, config: RewardFunctionsConfig) -> None:
        self.rewards = [_opened(ctx, config, index) for index in range(len(config.functions))]
        names = [reward.named.name for reward in self.rewards]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ConfigError(
                f"two rewards are named '{twice}'",
                "The config weighs rewards by name.",
                f"Give one another name: functions: [{{use: ..., name: {twice}-2}}]",
            )
        self._seen: set[str] | None = None
        self._crew = Crew([reward.named for reward in self.rewards], config)
        ctx.exit.callback(self._crew.close)

    def scores(self, rollouts: RolloutBatch, tokenizer: Any) -> Sequence[Score]:
        """One score for each reward; asked about no completions it says their names."""
        size = rollouts.samples
        groups = [rollouts.rollouts[at : at + size] for at in range(0, len(rollouts.rollouts), size)]
        if self._seen is None and groups:
            self._seen = {name for rollout in rollouts.rollouts for name in rollout.columns}
            require_present(self.rewards, self._seen)
        calls = [
            Call(at, index, given, reward.parameters.of(given))
            for at, group in enumerate(groups)
            for given in [_given(group, tokenizer)]
            for index, reward in enumerate(self.rewards)
        ]
        answers = self._crew.answers(calls)
        return [
            Score(
                name=reward.named.name,
                values_R=tuple(value for at in range(len(groups)) for value in answers[at, index]),
            )
            for index, reward in enumerate(self.rewards)
        ]


def _opened(ctx: Context, config: RewardFunctionsConfig, index: int) -> OpenedReward:
    entry = config.entries()[index]
    at = ("reward-functions", "functions", index, "options")
    items = ctx.items("reward")
    folders = (str(ctx.config.folder.resolve()), str(Path.cwd()))
    if entry.use in items:
        target, options = items[entry.use].target, dict(entry.options)
        options = validate(declared(target).options, options, ctx.config.layer, at).model_dump(mode="json")
        named = Named(entry.name or entry.use, entry.use, target, options, folders)
        return OpenedReward(named, parameters_of(named.open()))
    if not is_path(entry.use):
        raise ConfigError(
            f"there is no reward '{entry.use}' ({ctx.config.layer.origin(at[:3])})",
            did_you_mean(entry.use, items, "Active plugins declare:"),
            "Name one of these, or a function: ./file.py:function",
        )
    return _of_user(entry, folders)


def _of_user(entry: RewardEntry, folders: tuple[str, ...]) -> OpenedReward:
    if entry.options:
        raise ConfigError(
            f"the reward '{entry.use}' has options, but it is a function",
            "Options belong to built-in rewards; a function gets prompts, completions and columns.",
            "Remove the options, and write them into the function.",
        )
    named = Named("", entry.use, None, {}, folders)
    function = named.open()
    name = entry.name or str(getattr(function, "__name__", type(function).__name__))
    return OpenedReward(Named(name, entry.use, None, {}, folders), parameters_of(function))


def _given(group: Sequence[Rollout], tokenizer: Any) -> Given:
    """The keyword arguments for the completions of one prompt, as TRL's trainer makes them."""
    columns = {name: [rollout.columns.get(name) for rollout in group] for name in group[0].columns}
    texts = [tokenizer.decode(list(rollout.completion), skip_special_tokens=True) for rollout in group]
    prompts, completions = zip(*map(_told, group, texts, [tokenizer] * len(group)), strict=True)
    ids = [list(rollout.completion) for rollout in group]
    return {**columns, "prompts": list(prompts), "completions": list(completions), "completion_ids": ids}


def _told(rollout: Rollout, text: str, tokenizer: Any) -> tuple[Any, Any]:
    """A prompt and its completion: lists of messages if the row's prompt is one, else texts.

    A prompt that ends with words of the assistant is one that the completion goes on with.
    """
    prompt = rollout.columns.get("prompt")
    if isinstance(prompt, str):
        return prompt, text
    if not isinstance(prompt, Sequence) or not prompt:
        return tokenizer.decode(list(rollout.prompt), skip_special_tokens=True), text
    messages: list[Any] = [dict(message) for message in prompt if isinstance(message, Mapping)]
    if messages[-1].get("role") == "assistant":
        text = f"{messages.pop()['content']}{text}"
    return messages, [{"role": "assistant", "content": text}]
