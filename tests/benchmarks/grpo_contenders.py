"""Who takes the step that `grpo_step.py` measures: TRL, and Pegbox with its own engine or with TRL's completions."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pegbox.hooks import hookimpl
from preference_cases import fill_adapters

RANK, LEARNING_RATE = 16, 1e-4
QUESTIONS = (
    "What is 7 times 8?",
    "Name three colours of the rainbow.",
    "Ann has 12 apples. She gives 5 to Ben and 3 to Carl, then buys 4 more. How many apples has she now? Explain.",
    "Write one sentence about the sea.",
    "A train leaves at 9:40 and arrives at 12:05. It stops for 15 minutes in between. For how long does it move? Give "
    "the answer in minutes, and say how you found it.",
    "Who wrote Hamlet?",
    "Translate into French: good morning, my friend.",
    "A farmer has 3 fields. The first is 20 by 30 metres, the second twice as large, and the third half as large as "
    "the first. A kilogram of seed is enough for 50 square metres and costs 4 euros. What does the seed for all cost?",
)

Reached = tuple[float, float]
"""Loss and norm of the gradient of a step."""


@dataclass(frozen=True)
class Shape:
    """What a step takes: completions are `prompts * samples`, of at most `tokens` tokens; and where it is taken."""

    prompts: int
    samples: int
    tokens: int
    steps: int
    micro_batch: int
    device: str = "cpu"
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        """Of the base's weights; adapters are in float32."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass
class Watch:
    """Times of each step, and what was reached.

    Attributes:
        sampling, learning, whole: seconds of each step.
        completions: token ids of each step's completions, in the order of the prompts.
    """

    clock: Callable[[], float]
    sampling: list[float] = field(default_factory=list)
    learning: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)
    completions: list[list[tuple[int, ...]]] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    peak_bytes: int = 0
    last: float = 0.0
    scored_at: float = 0.0

    def begins(self, module: torch.nn.Module) -> None:
        """Adapters get their numbers, and the clock starts."""
        fill_adapters(module)
        self.last = self.clock()

    def sampled(self, seconds: float, completions: Sequence[Sequence[int]]) -> None:
        """The engine has answered."""
        self.sampling.append(seconds)
        self.completions.append([tuple(map(int, one)) for one in completions])

    def scored(self) -> None:
        """All rewards of a generation are known: learning begins."""
        self.scored_at = self.clock()

    def stepped(self) -> None:
        """The optimizer's step was made."""
        now = self.clock()
        self.learning.append(now - self.scored_at)
        self.whole.append(now - self.last)
        self.last = now


def reward_of(completion: Sequence[int]) -> float:
    """The share of different tokens, less a little for each token, and what few completions share."""
    return len(set(completion)) / len(completion) - 0.01 * len(completion) + sum(completion) % 17 / 170


def prompt_ids(folder: Path, count: int) -> tuple[list[str], list[list[int]]]:
    """Prompts as texts and as tokens, rendered by the model's template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = [QUESTIONS[at % len(QUESTIONS)] for at in range(count)]
    chats = [[{"role": "user", "content": question}] for question in questions]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return texts, [tokenizer(text)["input_ids"] for text in texts]


# ---- TRL ----


def run_trl(shape: Shape, folder: Path, checkpointing: bool, watch: Watch) -> None:
    """GRPOTrainer without vLLM."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stepped()

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            if "loss" in logs:
                watch.reached.append((float(logs["loss"]), float(logs["grad_norm"])))

    class Timed(GRPOTrainer):  # type: ignore[misc]
        def _generate_single_turn(self, prompts: Any, *arguments: Any, **named: Any) -> Any:
            began = watch.clock()
            made = super()._generate_single_turn(prompts, *arguments, **named)
            watch.sampled(watch.clock() - began, made[0])
            watch.prompts = [list(one) for one in prompts]
            return made

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            made = super()._generate_and_score_completions(inputs)
            watch.scored()
            return made

    def reward(completion_ids: Any, **_: Any) -> list[float]:
        return [reward_of(ids) for ids in completion_ids]

    texts, _ = prompt_ids(folder, shape.prompts)
    with tempfile.TemporaryDirectory() as output:
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=shape.dtype),
            reward_funcs=reward,
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            args=_trl_settings(shape, output, checkpointing),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear"),
            callbacks=[Clock()],
        )
        watch.begins(trainer.model)
        trainer.train()


def _trl_settings(shape: Shape, output: str, checkpointing: bool) -> Any:
    """TRL's own settings, all but those of the shape at what both sides share."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=output,
        max_steps=shape.steps,
        per_device_train_batch_size=shape.micro_batch,
        gradient_accumulation_steps=shape.prompts * shape.samples // shape.micro_batch,
        num_generations=shape.samples,
        max_completion_length=shape.tokens,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        shuffle_dataset=False,
        gradient_checkpointing=checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=shape.device == "cpu",
        bf16=shape.precision == "bf16",
        disable_tqdm=True,
    )


# ---- Pegbox ----


class Prompts:
    """Prompts as rows of the training split (`pegbox.rows.Examples`)."""

    split, fingerprint = "train", "questions"

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Any:
        from pegbox.rows import Example

        return Example(input_ids=self._ids[index], labels=[-100] * len(self._ids[index]))

    def describe(self, index: int) -> str:
        return f"question {index}"


class Measured(Exception):
    """Ends a run before its export: all is known."""


class Asked:
    """The plugin that brings prompts and the reward, and measures."""

    def __init__(self, shape: Shape, ids: Sequence[Sequence[int]], watch: Watch) -> None:
        self._shape, self._ids, self._watch = shape, ids, watch

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return Prompts(self._ids) if split == "train" else None

    @hookimpl(wrapper=True)
    def generate_rollouts(self) -> Generator[None, Any, Any]:
        began = self._watch.clock()
        made = yield
        self._watch.sampled(self._watch.clock() - began, [one.completion for one in made.rollouts])
        return made

    @hookimpl
    def score_rollouts(self, rollouts: Any) -> Any:
        from pegbox.rollouts import Score

        scores = [Score(name="distinct", values_R=tuple(reward_of(one.completion) for one in rollouts.rollouts))]
        self._watch.scored()
        return scores

    @hookimpl
    def on_event(self, event: Any) -> None:
        from pegbox.events import Logged, RunStarted, Stepped

        if isinstance(event, RunStarted):
            self._watch.begins(event.job.model.module)
        elif isinstance(event, Stepped):
            self._watch.stepped()
        elif isinstance(event, Logged) and "grad_norm" in event.metrics:
            self._watch.reached.append((event.metrics["loss"], event.metrics["grad_norm"]))
            if event.step == self._shape.steps:
                raise Measured


class Replay:
    """An engine that answers with what TRL sampled."""

    def __init__(self, completions: Sequence[Sequence[tuple[int, ...]]]) -> None:
        self._left: Iterator[Sequence[tuple[int, ...]]] = iter(completions)
        self._version = 0

    @hookimpl
    def sync_weights(self, update: Any) -> Any:
        from pegbox.rollouts import SyncReceipt

        self._version = update.version
        return SyncReceipt(engine="replay", version=update.version, evidence="answers are recorded")

    @hookimpl
    def generate_rollouts(self, request: Any) -> Any:
        from pegbox.rollouts import Rollout, RolloutBatch

        places = [at for at in range(len(request.prompts)) for _ in range(request.samples)]
        made = [
            Rollout(
                prompt=request.prompts[at],
                completion=completion,
                logps=(),
                first_version=self._version,
                last_version=self._version,
                finished=len(completion) < request.sampling.max_tokens,
                columns=request.columns[at],
            )
            for at, completion in zip(places, next(self._left), strict=True)
        ]
        return RolloutBatch(rollouts=tuple(made), samples=request.samples)


def run_pegbox(
    shape: Shape,
    folder: Path,
    replayed: Sequence[Sequence[tuple[int, ...]]] | None,
    watch: Watch,
    *,
    continuous: bool = False,
) -> None:
    """Our run, with its own engine or the completions of another."""
    from pegbox.plan import compose
    from pegbox.run import execute

    _, ids = prompt_ids(folder, shape.prompts)
    engine = "rollout-hf" if replayed is None else "replay"
    instances: dict[str, object] = {"asked": Asked(shape, ids, watch)}
    if replayed is not None:
        instances["replay"] = Replay(replayed)
    with tempfile.TemporaryDirectory() as output, suppress(Measured):
        config = {
            "model": {"name": str(folder), "dtype": str(shape.dtype).removeprefix("torch.")},
            "plugins": ["hf", "asked", "lora", "grpo", engine, "adamw", "trainer"],
            "output": str(Path(output) / "run"),
            "lora": {"r": RANK, "alpha": 2 * RANK, "targets": "all-linear"},
            **({"rollout-hf": {"continuous": "on"}} if continuous else {}),
            "grpo": {
                "samples": shape.samples,
                "max_completion_length": shape.tokens,
                "completions": 0,
                # TRL's sampler gives no log-probabilities that could be compared with the trainer's.
                **({} if replayed is None else {"importance_sampling_correction": "none"}),
            },
            "adamw": {"learning_rate": LEARNING_RATE, "schedule": "constant", "weight_decay": 0.0},
            "trainer": {
                "max_steps": shape.steps,
                "batch": shape.prompts,
                "micro_batch": shape.micro_batch,
                "precision": shape.precision,
                "device": "cpu" if shape.device == "cpu" else "auto",
                "shuffle": False,
                "max_grad_norm": 1.0,
                "log_every": 1,
                "save_every": None,
                "progress": "none",
            },
        }
        execute(compose(config, instances=instances))
