"""Asking a server for the completions of a request, several prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pegbox.errors import RunError

from pegbox_rollout_vllm.asking import Completion, completion_body, completions, greedy, samples_of

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rollouts import RolloutRequest
    from pegbox.types import Model

    from pegbox_rollout_vllm.client import Client


def missing(request: RolloutRequest, made: dict[int, list[Completion]]) -> list[int]:
    """Prompts that have no completions yet."""
    return [index for index in range(len(request.prompts)) if index not in made]


def ask_all(
    client: Client,
    name: str,
    request: RolloutRequest,
    stop_ids: Sequence[int],
    parallel: int,
    made: dict[int, list[Completion]],
) -> None:
    """Ask the model `name` for what `made` lacks; the first failure breaks off what is under way and is raised.

    Args:
        stop_ids: ids that end a completion.
        parallel: prompts that are asked at once.
        made: fills up with the completions of each prompt; what came before a failure is kept.

    Raises:
        RunError: an answer is not what was asked for.
        ServerGone: the server is gone.
        Refused: the server answered with an error.
    """
    wanted = missing(request, made)
    if not wanted:
        return
    samples = 1 if greedy(request.sampling) else request.samples

    def ask(index: int) -> None:
        answer = client.post("/v1/completions", completion_body(name, request, index, stop_ids))
        made[index] = samples_of(request, completions(answer, name, samples))

    pool = ThreadPoolExecutor(min(parallel, len(wanted)), "rollout-vllm")
    try:
        for asked in [pool.submit(ask, index) for index in wanted]:
            asked.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()
        raise
    finally:
        pool.shutdown(wait=True)


def require_room(request: RolloutRequest, longest: int | None) -> None:
    """vLLM cuts completions short without a word where the prompt leaves no room.

    Raises:
        RunError: a prompt and its completion may be longer than vLLM's `longest`.
    """
    prompt, new = max(map(len, request.prompts), default=0), request.sampling.max_tokens
    if longest is not None and prompt + new > longest:
        raise RunError(
            f"a prompt of {prompt} tokens and {new} new ones are more than vLLM's {longest}",
            "It would cut the completion short and say nothing.",
            "Raise rollout-vllm.max_model_len, or shorten prompts or completions.",
        )


def stop_ids(ctx: Context, model: Model, request: RolloutRequest) -> list[int]:
    """Ids that end a completion: those asked for, and the model's and the tokenizer's end of turn."""
    told = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    ends = [told] if isinstance(told, int) else list(told or ())
    ends.append(getattr(ctx.processor.tokenizer, "eos_token_id", None))
    return sorted({*request.sampling.stop_ids, *(token for token in ends if token is not None)})
