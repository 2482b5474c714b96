"""vLLM in the trainer's process: its `LLM` with the engine's core, the scheduler and the worker all in here.

vLLM puts its core into another process unless VLLM_ENABLE_V1_MULTIPROCESSING is 0; only with it in this one can weights
be handed over as tensors. The variable is set while the engine is made and at no other time. vLLM seeds every random
generator and sets threads of torch as it starts, and samples from torch's generators: all of that is put back.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pegbox.errors import ConfigError, RunError

from pegbox_rollout_vllm.asking import SCORED, SINGLE, completed, require_certain, samples_of, sampling_fields
from pegbox_rollout_vllm.cargo import Cargo, Live
from pegbox_rollout_vllm.options import SERVED, engine_words
from pegbox_rollout_vllm.sampler import missing
from pegbox_rollout_vllm.serving import UnknownToken

if TYPE_CHECKING:
    from pegbox.rollouts import RolloutRequest

    from pegbox_rollout_vllm.asking import Completion
    from pegbox_rollout_vllm.config import RolloutVllmConfig
    from pegbox_rollout_vllm.options import Shape

T = TypeVar("T")
WHILE_MADE = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
"""Environment variables while vLLM's engine is made."""
UNLESS_SET = {"VLLM_LOGGING_LEVEL": "WARNING"}
"""Likewise, where the environment says nothing else: the run's own lines should not drown."""


class Colocated:
    """See the module, and `serving.Vllm`."""

    title = "vLLM in this process"
    own = True

    def __init__(self, config: RolloutVllmConfig, shape: Shape, precision: str) -> None:
        self._config, self._shape, self._precision = config, shape, precision
        self._llm: Any = None
        self._adapters: dict[str, Any] = {}
        self._numbers = count(1)
        self._asleep = self._joined_before = False
        self.base = SERVED
        self.longest: int | None = None
        self.met = 0

    def start(self) -> None:
        """Make the engine, which takes its memory now.

        Raises:
            ConfigError: it shall sleep, and vLLM cannot on this device.
            RunError: vLLM does not start, or another one lives here.
        """
        with _as_before(), _variables(WHILE_MADE):
            from vllm import LLM
            from vllm.distributed.parallel_state import model_parallel_is_initialized
            from vllm.platforms import current_platform

            if model_parallel_is_initialized():
                raise RunError(
                    "another vLLM is in this process already",
                    "vLLM's groups of processes are global: two would disturb each other.",
                    "Let one run end before the next one starts.",
                )
            if self._config.sleep and not current_platform.is_sleep_mode_available():
                raise ConfigError(
                    f"rollout-vllm.sleep is true, and vLLM has no sleep mode on a {current_platform.device_type}",
                    "It could not give its memory back.",
                    "Remove rollout-vllm.sleep.",
                )
            arguments = self._arguments()
            self._joined_before = torch.distributed.is_initialized()
            try:
                self._llm = LLM.from_engine_args(arguments)
            except Exception as error:
                self._leave()
                raise RunError(
                    f"vLLM did not start in this process: {error}",
                    "Beside a trainer it has less memory than alone.",
                    "Mend what it says; rollout-vllm.memory_share says how much of a GPU it takes.",
                ) from error
        self.longest = int(self._llm.model_config.max_model_len)

    def _arguments(self) -> Any:
        """vLLM's own, from the words that a server would be started with.

        Raises:
            ConfigError: it does not know one of them.
        """
        from vllm import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        words = ["--model", self._shape.base, *engine_words(self._config, self._shape, self._precision)]
        try:
            return EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words))
        except SystemExit as error:
            raise ConfigError(
                f"vLLM does not take these arguments: {' '.join(words)}",
                "What it says about them stands above.",
                "Change rollout-vllm.args.",
            ) from error

    def reach(self) -> None:
        self.met += 1

    def close(self) -> None:
        """End it, and give its memory and its process group back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            self._leave()

    def _leave(self) -> None:
        """Undo vLLM's groups of processes."""
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        destroy_model_parallel()
        if not self._joined_before:
            destroy_distributed_environment()

    def persist(self, work: Callable[[], T], restore: Callable[[], None]) -> T:
        """Do `work`: if vLLM dies here, so does the run."""
        return work()

    def sleep(self) -> None:
        if not self._asleep:
            self._llm.sleep(level=self._config.sleep_level)
            self._asleep = True

    def wake(self) -> bool:
        if not self._asleep:
            return False
        self._llm.wake_up()
        self._asleep = False
        return self._config.sleep_level == 2

    def complete(
        self, name: str, request: RolloutRequest, stop_ids: Sequence[int], made: dict[int, list[Completion]]
    ) -> None:
        wanted = missing(request, made)
        fields = [sampling_fields(request, index, stop_ids) for index in wanted]
        outputs = self._sampled(name, [request.prompts[index] for index in wanted], fields)
        for index, output in zip(wanted, outputs, strict=True):
            found = [completed(one.token_ids, _chosen(one), one.finish_reason) for one in output.outputs]
            made[index] = samples_of(request, found)

    def score(self, name: str, tokens: Sequence[int]) -> list[float]:
        try:
            (output,) = self._sampled(name, [tokens], [SCORED])
        except Exception as error:
            if "vocabulary" in str(error):
                raise UnknownToken(str(error)) from error
            raise
        return [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], tokens[1:], strict=True)]

    def require_processed(self, tokens: Sequence[int]) -> None:
        (output,) = self._sampled(self.base, [tokens], [SINGLE])
        require_certain(*_chosen(output.outputs[0]))

    def _sampled(self, name: str, prompts: Sequence[Sequence[int]], fields: Sequence[dict[str, Any]]) -> list[Any]:
        """vLLM's outputs for prompts of token ids, in order.

        Raises:
            RunError: another adapter answered.
        """
        from vllm import SamplingParams

        adapter = None if name == self.base else self._adapters[name]
        with _as_before():
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(prompt)} for prompt in prompts],
                [SamplingParams(**each) for each in fields],
                lora_request=adapter,
                use_tqdm=False,
            )
        for output in outputs:
            answered = output.lora_request and output.lora_request.lora_name
            if answered != (adapter and name):
                raise RunError(
                    f"vLLM answered with '{answered or self.base}', '{name}' was asked for",
                    "The completions would be those of other weights than the ones that are trained.",
                    "Report it, with vLLM's version.",
                )
        return list(outputs)

    def adapters(self) -> dict[str, str]:
        held = self._llm.llm_engine.list_loras()
        return {name: one.lora_path for name, one in self._adapters.items() if one.lora_int_id in held}

    def load_adapter(self, name: str, folder: Path) -> None:
        from vllm.lora.request import LoRARequest

        made = LoRARequest(name, next(self._numbers), str(folder))
        try:
            self._llm.llm_engine.add_lora(made)
        except Exception as error:
            raise RunError(
                f"vLLM did not take the weights {name} from {folder}: {error}",
                "It loads adapters in PEFT's layout, up to the rank that it was started for.",
                "Change what it names.",
            ) from error
        self._adapters[name] = made

    def unload_adapter(self, name: str) -> None:
        self._llm.llm_engine.remove_lora(self._adapters.pop(name).lora_int_id)

    def take(self, name: str, cargo: Cargo) -> None:
        """Full weights in place: vLLM copies them out of the trainer's tensors."""
        assert isinstance(cargo, Live), "what is taken in place is alive"
        entries = cargo.weights.entries(self._llm.model_config.dtype)
        arriving = ((each, tensor.to(dtype)) for each, tensor, dtype in entries)
        with _as_before():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": arriving})

    def read_base(self) -> None:
        """Nobody uses it after the run."""

    def settle(self, label: str) -> None:
        self._llm.reset_prefix_cache()
        self._llm.llm_engine.set_weight_version(label)

    def label(self) -> str | None:
        return str(self._llm.llm_engine.get_weight_version())

    def checksums(self) -> dict[str, str] | None:
        (found,) = self._llm.collective_rpc("compute_weight_checksums")
        return dict(found)


def _chosen(output: Any) -> list[float]:
    """The log-probability of each token of a completion."""
    return [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]


@contextmanager
def _as_before() -> Iterator[None]:
    """Random generators, torch's threads and its function that sets them are afterwards what they were."""
    threads, set_threads, state = torch.get_num_threads(), torch.set_num_threads, random.getstate()
    numbers = _numpy_state()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(state)
        numbers()
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _numpy_state() -> Callable[[], None]:
    """Puts numpy's global generator back to what it is now."""
    import numpy

    state = numpy.random.get_state()
    return lambda: numpy.random.set_state(state)


@contextmanager
def _variables(wanted: dict[str, str]) -> Iterator[None]:
    """Within it the environment has these variables; afterwards it is as before, whatever vLLM has set itself."""
    before = dict(os.environ)
    os.environ.update({**UNLESS_SET, **before, **wanted})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
