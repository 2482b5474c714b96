"""Requests of vLLM's completion endpoint, and what its answers say. Pure functions.

Prompts go in as token ids and completions come out as token ids, so no text is ever tokenized twice. Log-probabilities
are those of the distribution that was sampled from: after penalties, temperature, top-k, top-p and min-p (vLLM's
`--logprobs-mode processed_logprobs`, as TRL's trainers ask for).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pegbox.errors import ConfigError, RunError
from pegbox.rollouts import RolloutRequest, Sampling

TOKEN = "token_id:"


class Completion(NamedTuple):
    """One completion: its tokens, the sampler's log-probability of each, and whether it ended by itself."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finished: bool


def prompt_seed(seed: int, index: int) -> int:
    """The seed of prompt number `index`; vLLM adds a sample's number to it, so neighbours must lie far apart."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def sampling_fields(request: RolloutRequest, index: int, stop_ids: Sequence[int]) -> dict[str, Any]:
    """How prompt `index` is sampled, by the names that vLLM's endpoint and its `SamplingParams` share.

    Greedy samples are all the same: one is asked.

    Args:
        stop_ids: ids that end a completion, those of the sampling included.
    """
    sampling = request.sampling
    fields: dict[str, Any] = {
        "n": 1 if greedy(sampling) else request.samples,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": list(stop_ids),
        "skip_special_tokens": False,
        "logprobs": 0,
    }
    if sampling.seed is not None:
        fields["seed"] = prompt_seed(sampling.seed, index)
    return fields


SCORED = {"max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
"""Log-probabilities of given tokens; vLLM makes one token at least."""
SINGLE = {"max_tokens": 1, "temperature": 1.0, "top_k": 1, "logprobs": 0}
"""One token, the only one that is allowed: its probability after the filters is 1."""


def completion_body(name: str, request: RolloutRequest, index: int, stop_ids: Sequence[int]) -> dict[str, object]:
    """The request for all samples of prompt `index` of the model `name`."""
    return {
        "model": name,
        "prompt": list(request.prompts[index]),
        **sampling_fields(request, index, stop_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def greedy(sampling: Sampling) -> bool:
    return sampling.temperature == 0


def samples_of(request: RolloutRequest, found: list[Completion]) -> list[Completion]:
    """As many completions of a prompt as were asked for, of those that `sampling_fields` lets vLLM make."""
    return found * request.samples if greedy(request.sampling) else found


def completions(answer: Mapping[str, Any], name: str, wanted: int) -> list[Completion]:
    """The completions of one answer, in order.

    Raises:
        RunError: another model answered, completions are missing, or tokens and log-probabilities do not fit together.
    """
    require_model(answer, name)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    if len(choices) != wanted:
        raise RunError(
            f"vLLM gave {len(choices)} completions of a prompt, {wanted} were asked for",
            "The rest of the batch would be of the wrong prompts.",
            "Look at the server's log.",
        )
    return [_completion(choice) for choice in choices]


def _completion(choice: Mapping[str, Any]) -> Completion:
    tokens, scores = choice.get("token_ids"), (choice.get("logprobs") or {})
    logps, named = scores.get("token_logprobs"), scores.get("tokens")
    if tokens is None or logps is None or named != [f"{TOKEN}{token}" for token in tokens]:
        raise RunError(
            "vLLM's answer holds no token ids with log-probabilities",
            f"Token ids: {str(tokens)[:80]}; tokens of the log-probabilities: {str(named)[:80]}.",
            "Use a vLLM that knows return_token_ids (0.10 or newer).",
        )
    return completed(tokens, logps, choice["finish_reason"])


def completed(tokens: Sequence[int], logps: Sequence[float], reason: str | None) -> Completion:
    """A completion that ended as completions do.

    Raises:
        RunError: it did not.
    """
    if reason not in ("stop", "length") or not all(map(_finite, logps)):
        raise RunError(
            f"vLLM ended a completion with '{reason}' after {len(tokens)} tokens",
            "It was broken off, or its log-probabilities are not numbers.",
            "Look at its log.",
        )
    return Completion(tuple(tokens), tuple(map(float, logps)), reason == "stop")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def require_model(answer: Mapping[str, Any], name: str) -> None:
    """Raise unless the answer says that `name` gave it.

    Raises:
        RunError: another model or adapter did.
    """
    if answer.get("model") != name:
        raise RunError(
            f"the vLLM server answered with '{answer.get('model')}', '{name}' was asked for",
            "The completions would be those of other weights than the ones that are trained.",
            "Look at what stands between the run and the server; nothing may rewrite the model's name.",
        )


def score_body(name: str, tokens: Sequence[int]) -> dict[str, object]:
    """The request for the log-probabilities of given tokens."""
    return {"model": name, "prompt": list(tokens), **SCORED, "return_token_ids": True}


def scores(answer: Mapping[str, Any], name: str, tokens: Sequence[int]) -> list[float]:
    """Log-probability of each token after the first, given those before it.

    Raises:
        RunError: another model answered, or the server gives none.
    """
    require_model(answer, name)
    found = answer["choices"][0].get("prompt_logprobs")
    if not found or len(found) != len(tokens):
        raise RunError(
            "vLLM's answer holds no log-probabilities of the prompt",
            "Without them nobody can tell which weights it computes with.",
            "Use a vLLM that knows prompt_logprobs.",
        )
    return [float(entry[str(token)]["logprob"]) for entry, token in zip(found[1:], tokens[1:], strict=True)]


def single_body(name: str, tokens: Sequence[int]) -> dict[str, object]:
    """The request for the only token that is allowed."""
    return {"model": name, "prompt": list(tokens), **SINGLE}


def require_processed(answer: Mapping[str, Any]) -> None:
    """Raise unless the log-probability in the answer to `single_body` is that of what was sampled from.

    Raises:
        ConfigError: the server reports log-probabilities before temperature and filters.
    """
    (logp,) = answer["choices"][0]["logprobs"]["token_logprobs"]
    require_certain(logp)


def require_certain(logp: float) -> None:
    """Raise unless the only token that may be sampled has probability 1.

    Raises:
        ConfigError: it has not.
    """
    if abs(logp) > 1e-6:
        raise ConfigError(
            f"vLLM says that the only token it may sample has the log-probability {logp:.3g}",
            "It reports log-probabilities before temperature and filters, not those of what it samples from.",
            "Start it with --logprobs-mode processed_logprobs.",
        )
