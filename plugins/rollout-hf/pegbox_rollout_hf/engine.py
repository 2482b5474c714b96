"""The engine: requests in, rollouts out.

Prompts are sorted by length, so that a batch holds little padding; completions come back in the order of the request.
Several processes that train one model share a request: each samples every so-many-th prompt, and all get everything.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import ConfigError, RunError
from pegbox.rollouts import Rollout, RolloutBatch, SyncReceipt

from pegbox_rollout_hf.cache import roomy_cache
from pegbox_rollout_hf.completion import Completion, generation_config
from pegbox_rollout_hf.continuous import Wanted, require_able, sample_continuously, wanted
from pegbox_rollout_hf.decoding import Task, decode
from pegbox_rollout_hf.endings import StopTexts, ending_ids
from pegbox_rollout_hf.modes import bare, sampling_from
from pegbox_rollout_hf.receipts import evidence_of, version_marks
from pegbox_rollout_hf.sampling import Chooser, uniforms

if TYPE_CHECKING:
    from pegbox.rollouts import RolloutRequest, WeightUpdate
    from pegbox.types import Model, Processor, Runtime

    from pegbox_rollout_hf.config import RolloutHfConfig

NAME = "rollout-hf"


class Engine:
    """Samples with the policy of a run.

    Raises:
        ConfigError: the policy cannot generate, or this process holds only a part of it.
    """

    def __init__(self, config: RolloutHfConfig, model: Model, processor: Processor, runtime: Runtime) -> None:
        _require_generation(model)
        self._config, self._processor, self._runtime = config, processor, runtime
        self._module, self._network = model.module, bare(model.module)
        self._version = 0
        self._marks: tuple[int, ...] | None = None
        if config.continuous == "on":
            require_able(runtime)

    def sync(self, update: WeightUpdate) -> SyncReceipt:
        """The policy holds every update from the moment it is made; prove it."""
        evidence = evidence_of(update, self._module)
        self._version, self._marks = update.version, version_marks(self._module)
        return SyncReceipt(engine=NAME, version=update.version, evidence=evidence)

    def generate(self, request: RolloutRequest, seed: int) -> RolloutBatch:
        """Completions of every prompt; on several processes all of them return all of them."""
        self._require_known_weights(request)
        _require_prompts(request)
        mine = range(self._runtime.rank, len(request.prompts), self._runtime.world_size)
        with sampling_from(self._module, self._runtime):
            made = self._sampled(request, mine, seed)
        if self._runtime.world_size > 1:
            made = self._gathered(request, seed, made)
        ordered = sorted(made, key=lambda one: (one.prompt, one.sample))
        rollouts = (self._rollout(request, one) for one in ordered)
        return RolloutBatch(rollouts=tuple(rollouts), samples=request.samples)

    def _sampled(self, request: RolloutRequest, prompts: Sequence[int], seed: int) -> list[Completion]:
        sampling = request.sampling
        ending = ending_ids(self._network.generation_config, self._processor.tokenizer, sampling)
        if wanted(self._config, self._runtime, self._network, sampling):
            task = Wanted(prompts, ending, self._processor.pad_id, seed)
            return sample_continuously(self._config, self._network, self._runtime, request, task)
        return self._looped(request, prompts, ending, seed)

    def _looped(
        self, request: RolloutRequest, prompts: Sequence[int], ending: tuple[int, ...], seed: int
    ) -> list[Completion]:
        sampling, device = request.sampling, self._runtime.device
        chooser = Chooser(sampling)
        texts = StopTexts(sampling.stop, self._processor.tokenizer)
        made: list[Completion] = []
        for places in self._batches(request, prompts):
            rows = list(dict.fromkeys(prompt for prompt, _ in places))
            task = Task(
                chooser=chooser,
                ending=ending,
                texts=texts,
                prompt_R=torch.tensor([rows.index(prompt) for prompt, _ in places], device=device),
                uniform_RS=uniforms(seed, places, sampling.max_tokens).to(device),
            )
            self._decode([request.prompts[row] for row in rows], task, sampling.max_tokens)
            made += _completions(places, task)
        return made

    def _batches(self, request: RolloutRequest, prompts: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        """(prompt, sample) pairs, longest prompts first: a batch that does not fit into memory fails at once."""
        order = sorted(prompts, key=lambda at: -len(request.prompts[at]))
        places = [(prompt, sample) for prompt in order for sample in range(request.samples)]
        for begin in range(0, len(places), self._config.batch):
            yield places[begin : begin + self._config.batch]

    def _decode(self, prompts: Sequence[Sequence[int]], task: Task, max_tokens: int) -> None:
        longest = max(map(len, prompts))
        # Padding repeats a token that the prompt has: it is masked, and the repetition penalty cannot see it.
        ids_PT = torch.tensor([[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask_PT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ending = list(task.ending) or None
        self._network.generate(
            input_ids=ids_PT.to(self._runtime.device),
            attention_mask=mask_PT.to(self._runtime.device),
            past_key_values=roomy_cache(self._network.config, longest + max_tokens),
            generation_config=generation_config(max_tokens, self._processor.pad_id, ending),
            custom_generate=decode,
            task=task,
        )

    def _rollout(self, request: RolloutRequest, one: Completion) -> Rollout:
        return Rollout(
            prompt=request.prompts[one.prompt],
            completion=one.tokens,
            logps=one.logps,
            first_version=self._version,
            last_version=self._version,
            finished=one.finished,
            columns=request.columns[one.prompt],
        )

    def _gathered(self, request: RolloutRequest, seed: int, made: list[Completion]) -> list[Completion]:
        asked = hashlib.blake2b(repr((request.prompts, request.samples, request.sampling, seed)).encode()).hexdigest()
        every: Any = self._runtime.gather_objects((asked, made))
        if any(other != asked for other, _ in every):
            raise RunError(
                "processes of one run ask for different rollouts",
                "They share the work of one request, so that each must make the same one.",
                "Report this with the plugin that asks for rollouts.",
            )
        return [one for _, part in every for one in part]

    def _require_known_weights(self, request: RolloutRequest) -> None:
        if request.split == "train" and self._marks not in (None, version_marks(self._module)):
            raise RunError(
                f"the policy was changed after version {self._version} was announced",
                "Completions would be sampled with weights that have no version.",
                "Call sync_weights after the optimizer's step and before generate_rollouts.",
            )


def _completions(places: Sequence[tuple[int, int]], task: Task) -> Iterator[Completion]:
    tokens, logps = task.token_RS.tolist(), task.logp_RS.tolist()
    for row, (prompt, sample) in enumerate(places):
        length = task.length_R[row]
        ids, values = tuple(tokens[row][:length]), tuple(logps[row][:length])
        yield Completion(prompt, sample, ids, values, task.finished_R[row])


def _require_generation(model: Model) -> None:
    from torch.distributed.tensor import DTensor

    if not hasattr(bare(model.module), "generate"):
        raise ConfigError(
            f"rollout-hf cannot sample: {type(model.module).__name__} cannot generate",
            "It has no method generate().",
            "Load a causal language model of transformers, or use another plugin that owns generate_rollouts.",
        )
    if any(isinstance(parameter, DTensor) for parameter in model.module.parameters()):
        raise ConfigError(
            "rollout-hf cannot sample: parameters are sharded over processes",
            "Every process would hold a part of the model alone, and gather all of it for every token.",
            "Place the model whole on each process, or use rollout-vllm.",
        )


def _require_prompts(request: RolloutRequest) -> None:
    empty = [at for at, prompt in enumerate(request.prompts) if not prompt]
    if empty:
        raise RunError(
            f"prompt {empty[0]} of a request has no token",
            "A causal model goes on from at least one.",
            "Give every prompt a beginning-of-text token, or leave the row out.",
        )
