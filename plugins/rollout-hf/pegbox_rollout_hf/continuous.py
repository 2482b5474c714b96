"""transformers' continuous batching: completions that end make room for waiting ones with the next token.

It keeps keys and values in pages that the samples of a prompt share (Kwon et al. 2023, arXiv:2309.06180). It samples
from torch's global generator, which is seeded and put back: what one prompt gets depends on what is computed beside it.
It has attention of its own, so that networks whose attention a plugin brings are sampled from by our loop. And it
computes in a thread of its own, which knows nothing of the run's arithmetic: the forward brings that along.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, RunError

from pegbox_rollout_hf.modes import AUTOCAST

if TYPE_CHECKING:
    from pegbox.rollouts import RolloutRequest, Sampling
    from pegbox.types import Runtime

    from pegbox_rollout_hf.completion import Completion
    from pegbox_rollout_hf.config import RolloutHfConfig


OWN = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
PACKED = "sdpa_documents"
"""The attention that the plugin hf chooses for packed rows; without borders of documents it is torch's usual one."""


@dataclass(frozen=True)
class Wanted:
    """What is sampled: numbers of prompts, token ids that end, the padding token, the seed."""

    prompts: Sequence[int]
    ending: tuple[int, ...]
    pad_id: int
    seed: int


def require_able(runtime: Runtime) -> None:
    """Raises ConfigError where there is no GPU."""
    if runtime.device.type != "cuda":
        raise ConfigError(
            f"rollout-hf.continuous is on, but the run is on the device '{runtime.device.type}'",
            "Continuous batching pays on a GPU only.",
            "Remove rollout-hf.continuous, or set it to auto.",
        )


def beyond(sampling: Sampling) -> list[str]:
    """What a sampling asks for that continuous batching does not do, or reports other log-probabilities with."""
    asked = {
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k > 0,
        "min_p": sampling.min_p > 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "stop": bool(sampling.stop),
    }
    return [name for name, used in asked.items() if used]


def wanted(config: RolloutHfConfig, runtime: Runtime, network: Any, sampling: Sampling) -> bool:
    """Whether this request is sampled so.

    Raises:
        ConfigError: the config insists, and the sampling or the network's attention asks for more.
    """
    more = beyond(sampling)
    attention = network.config._attn_implementation
    if attention.removeprefix("paged|") not in (*OWN, PACKED):
        more.append(f"attention {attention}")
    arithmetic = AUTOCAST.get(runtime.precision, network.dtype)
    if network.dtype != arithmetic:
        # Its cache would take the weights' type, and get the arithmetic's.
        more.append(f"weights in {network.dtype} under {arithmetic}")
    if config.continuous == "on" and more:
        raise ConfigError(
            f"rollout-hf.continuous is on, but the run has {', '.join(more)}",
            "Continuous batching computes without these, or reports log-probabilities under them.",
            "Set rollout-hf.continuous to auto.",
        )
    return config.continuous != "off" and runtime.device.type == "cuda" and not more


def sample_continuously(
    config: RolloutHfConfig, network: Any, runtime: Runtime, request: RolloutRequest, task: Wanted
) -> list[Completion]:
    """Completions of some prompts of a request.

    Raises:
        RunError: a completion failed or is missing.
    """
    from transformers.generation import ContinuousBatchingConfig

    from pegbox_rollout_hf.completion import Completion, generation_config

    sampling = request.sampling
    heat = {"temperature": sampling.temperature} if sampling.temperature else {"do_sample": False}
    share = {"max_memory_percent": config.cache_share} if config.cache_share is not None else {}
    options = ContinuousBatchingConfig(
        return_logprobs=True, seed=task.seed % (1 << 32), drop_unsupported_processors=False, **share
    )
    places = [(prompt, sample) for prompt in task.prompts for sample in range(request.samples)]
    if not places:
        return []
    with _arithmetic_of(network, runtime):
        answers = network.generate_batch(
            inputs=[list(request.prompts[prompt]) for prompt, _ in places],
            generation_config=generation_config(sampling.max_tokens, task.pad_id, list(task.ending) or None, **heat),
            continuous_batching_config=options,
        )
    outputs = list(answers.values())
    failed = [output.error for output in outputs if output.error is not None]
    if failed or len(outputs) != len(places):
        raise RunError(
            f"continuous batching gave {len(outputs) - len(failed)} of {len(places)} completions",
            f"transformers says: {failed[0] if failed else 'nothing, see its messages above'}.",
            "Set rollout-hf.continuous: off, or rollout-hf.cache_share lower.",
        )
    made = []
    for (prompt, sample), output in zip(places, outputs, strict=True):
        tokens = tuple(output.generated_tokens)
        finished = bool(tokens) and tokens[-1] in task.ending
        made.append(Completion(prompt, sample, tokens, tuple(output.logprobs), finished))
    return made


@contextmanager
def _arithmetic_of(network: Any, runtime: Runtime) -> Iterator[None]:
    """Forwards in any thread compute as those of the run; attention for packed rows gives way to torch's usual one."""
    import torch

    dtype, attention = AUTOCAST.get(runtime.precision), network.config._attn_implementation
    own = "sdpa" if attention == PACKED else attention
    if (dtype or network.dtype) not in AUTOCAST.values():
        # transformers takes flash attention wherever it is installed, and that has no float32.
        own = f"paged|{own.removeprefix('paged|')}"
    before, forward = vars(network).get("forward"), network.forward

    @wraps(forward)
    def within(*given: Any, **named: Any) -> Any:
        with torch.autocast(runtime.device.type, dtype=dtype, enabled=dtype is not None):
            return forward(*given, **named)

    network.config._attn_implementation = own
    _set_forward(network, within)
    try:
        yield
    finally:
        network.config._attn_implementation = attention
        if before is None:
            del network.forward
        else:
            _set_forward(network, before)


def _set_forward(network: Any, forward: Callable[..., Any]) -> None:
    network.forward = forward
