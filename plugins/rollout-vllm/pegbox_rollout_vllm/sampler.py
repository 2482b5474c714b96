"""All completions of a request, many prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pegbox.errors import RunError

from pegbox_rollout_vllm.asking import Completion, completion_body, completions, greedy

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutRequest
    from pegbox.types import Model

    from pegbox_rollout_vllm.client import Client


class Sampler:
    """One request: `made` fills up with the completions of each prompt, and `ask` asks for those that are missing.

    Args:
        stop_ids: ids that end a completion.
        parallel: prompts that are asked at once.
    """

    def __init__(self, request: RolloutRequest, stop_ids: Sequence[int], parallel: int) -> None:
        self._request, self._stop_ids, self._parallel = request, stop_ids, parallel
        self.made: dict[int, list[Completion]] = {}

    def ask(self, client: Client, name: str) -> None:
        """Ask the model `name`; the first failure breaks off what is under way and is raised, what came is kept.

        Raises:
            RunError: an answer is not what was asked for.
            ServerGone: the server is gone.
            Refused: the server answered with an error.
        """
        missing = [index for index in range(len(self._request.prompts)) if index not in self.made]
        if not missing:
            return
        pool = ThreadPoolExecutor(min(self._parallel, len(missing)), "rollout-vllm")
        try:
            for asked in [pool.submit(self._ask_one, client, name, index) for index in missing]:
                asked.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise
        finally:
            pool.shutdown(wait=True)

    def _ask_one(self, client: Client, name: str, index: int) -> None:
        single = greedy(self._request.sampling)
        answer = client.post("/v1/completions", completion_body(name, self._request, index, self._stop_ids))
        found = completions(answer, name, 1 if single else self._request.samples)
        self.made[index] = found * self._request.samples if single else found


def require_room(request: RolloutRequest, longest: int | None) -> None:
    """vLLM cuts completions short without a word where the prompt leaves no room.

    Raises:
        RunError: a prompt and its completion may be longer than the server's `longest`.
    """
    prompt, new = max(map(len, request.prompts), default=0), request.sampling.max_tokens
    if longest is not None and prompt + new > longest:
        raise RunError(
            f"a prompt of {prompt} tokens and {new} new ones are more than the vLLM server's {longest}",
            "It would cut the completion short and say nothing.",
            "Raise rollout-vllm.max_model_len, or shorten prompts or completions.",
        )


def stop_ids(ctx: Context, model: Model, request: RolloutRequest) -> list[int]:
    """Ids that end a completion: those asked for, and the model's and the tokenizer's end of turn."""
    told = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    ends = [told] if isinstance(told, int) else list(told or ())
    ends.append(getattr(ctx.processor.tokenizer, "eos_token_id", None))
    return sorted({*request.sampling.stop_ids, *(token for token in ends if token is not None)})
