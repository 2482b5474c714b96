"""Asking for completions: weights are synced first, every rank asks for the same, and all ranks hold one answer.

Engines share the work of a request among the ranks as they like; what the first rank got counts for all, so that
rewards, batches and checkpoints are one thing on every rank.

Every update of the weights has a version, the number of optimizer steps behind it. Engines answer an update with a
receipt that names the version they now hold, and every completion names the first and the last version it was sampled
with; what does not fit stops the run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

from pegbox import hooks
from pegbox.errors import PegboxError, PluginError, RunError
from pegbox.rollouts import Rollout, RolloutBatch, RolloutRequest, Sampling, WeightUpdate

from pegbox_grpo.importing import user_function

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.record import Json
    from pegbox.rows import Split
    from pegbox.types import Model
    from torch import Tensor

    from pegbox_grpo.config import GrpoConfig

Generate = Callable[["Context", RolloutRequest], RolloutBatch]


class Engine:
    """Whoever makes the rollouts of this run: the owner of `generate_rollouts`, or the user's function."""

    def __init__(self, ctx: Context, model: Model, config: GrpoConfig) -> None:
        self.ctx, self.model, self.config = ctx, model, config
        self.version: int | None = None
        self._function: Generate | None = None
        if config.rollout_func is not None:
            self._function = user_function(ctx, config.rollout_func)

    # ---- weights ----

    def sync(self, version: int) -> None:
        """Bring every engine to the current weights, unless it was brought to this version before.

        Raises:
            RunError: an engine's receipt names another version, or no engine gave one.
        """
        if self.version == version:
            return
        kind: Literal["adapter", "full"] = "full" if self.model.adapter is None else "adapter"
        update = WeightUpdate(version=version, kind=kind, tensors=self._tensors())
        receipts = [receipt for _, receipt in self.ctx.each(hooks.sync_weights, self.ctx, update)]
        for receipt in receipts:
            if receipt.version != version:
                raise RunError(
                    f"the engine {receipt.engine} was given the weights of version {version}, and says that it holds "
                    f"version {receipt.version} ({receipt.evidence})",
                    "Completions of other weights than the policy's would be learnt from as if they were its own.",
                    f"Look at what {receipt.engine} logged, start it anew, then type resume=auto.",
                )
        if not receipts and self._function is None:
            raise RunError(
                f"no engine confirmed the weights of version {version}",
                "Completions could come from any weights.",
                "Fix the plugin that owns generate_rollouts: it answers sync_weights with a receipt.",
            )
        self.version = version

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapter's parameters, or all; sharded ones are gathered, which all ranks take part in."""
        for name, parameter in self.model.module.named_parameters():
            if parameter.requires_grad or self.model.adapter is None:
                whole = getattr(parameter, "full_tensor", None)
                yield name, (parameter if whole is None else whole()).detach()

    # ---- completions ----

    def generate(
        self,
        prompts: Sequence[tuple[int, ...]],
        columns: Sequence[Mapping[str, Json]],
        samples: int,
        sampling: Sampling,
        split: Split,
    ) -> tuple[Rollout, ...]:
        """Completions of all prompts, in their order, the same on every rank.

        Raises:
            PluginError: the answer does not fit the request.
            RunError: a completion is older than allowed.
        """
        request = RolloutRequest(
            prompts=tuple(prompts), columns=tuple(columns), samples=samples, sampling=sampling, split=split
        )
        answer = self._ask(request)
        first: list[object] = self.ctx.runtime.gather_objects(answer if self.ctx.runtime.rank == 0 else None)
        answer = cast("RolloutBatch", first[0])
        self._check(request, answer)
        return answer.rollouts

    def _ask(self, request: RolloutRequest) -> RolloutBatch:
        if self._function is not None:
            return self._played(request)
        return self.ctx.call(hooks.generate_rollouts, self.ctx, request)

    def _played(self, request: RolloutRequest) -> RolloutBatch:
        """What the user's function answers."""
        assert self._function is not None, "the caller looked"
        name = self.config.rollout_func
        try:
            answer = self._function(self.ctx, request)
        except PegboxError:
            raise
        except Exception as error:
            frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[1:])
            raise RunError(
                f"{name} raised {type(error).__name__}: {error}",
                f"The trace of the function:\n{''.join(frames).rstrip()}",
                "Repair the function, which grpo.rollout_func names.",
            ) from error
        if not isinstance(answer, RolloutBatch):
            raise PluginError(
                f"{name} returned {answer!r:.100}",
                "A request is answered with a pegbox.rollouts.RolloutBatch.",
                "Repair the function, which grpo.rollout_func names.",
            )
        return answer

    def _check(self, request: RolloutRequest, answer: RolloutBatch) -> None:
        who = self.config.rollout_func or self.ctx.kernel.owners("generate_rollouts").get("", "generate_rollouts")
        wanted = [prompt for prompt in request.prompts for _ in range(request.samples)]
        given = [tuple(rollout.prompt) for rollout in answer.rollouts]
        # An environment may say more in a prompt than the data does.
        if len(given) != len(wanted) or (self._function is None and given != wanted):
            raise PluginError(
                f"{who} was asked for {request.samples} completions of each of {len(request.prompts)} prompts, and "
                f"gave {len(answer.rollouts)} completions, or those of other prompts",
                "Rewards are compared within the completions of one prompt, which stand together in its order.",
                f"Fix {who}.",
            )
        for rollout in answer.rollouts:
            self._check_rollout(rollout, who)

    def _check_rollout(self, rollout: Rollout, who: str) -> None:
        tokens = len(rollout.completion)
        for name, values in (("log-probabilities", rollout.logps), ("marks of trained tokens", rollout.trained)):
            if len(values) not in (0, tokens):
                raise PluginError(
                    f"{who} gave a completion of {tokens} tokens with {len(values)} {name}",
                    "There is one for each token, or none at all.",
                    f"Fix {who}.",
                )
        if not rollout.logps and tokens and self.config.importance_sampling_correction != "none":
            raise PluginError(
                f"{who} gave a completion without the sampler's log-probabilities",
                "grpo.importance_sampling_correction compares them with the trainer's.",
                "Set grpo.importance_sampling_correction to none, or have them returned.",
            )
        now = 0 if self.version is None else self.version
        if not rollout.first_version <= rollout.last_version <= now:
            raise PluginError(
                f"{who} gave a completion of versions {rollout.first_version} to {rollout.last_version}, and the "
                f"policy is at version {now}",
                "Nothing can be sampled with weights that are not there yet.",
                f"Fix {who}.",
            )
        if now - rollout.first_version > self.config.max_staleness:
            raise RunError(
                f"a completion was sampled with weights of version {rollout.first_version}, and the policy is at "
                f"version {now}",
                f"grpo.max_staleness allows {self.config.max_staleness} versions between them.",
                f"Look at what {who} does with new weights, or raise grpo.max_staleness.",
            )
