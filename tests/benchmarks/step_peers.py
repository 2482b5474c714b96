"""The peers of `gpu_step.py`: TRL as its users run it, and Unsloth."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from step_cases import Case, filled
from step_watch import STEPS, Watch, device

RANK = 16


def made(case: Case, attention: str | None) -> Any:
    """The model with its weights on the GPU, the same for every contender."""
    import transformers

    config = getattr(transformers, case.config)(**case.fields, dtype="bfloat16")
    if attention == "flash_attention_4":
        importlib.import_module("flash_attn.cute")  # Not under the meta device, which tensors of its own would be on.
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, **({"attn_implementation": attention} if attention else {})
        )
    return filled(module)


def rows_of(case: Case) -> list[list[int]]:
    """Random tokens, the same for every contender."""
    vocabulary = case.fields.get("vocab_size", 201088)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (case.rows * STEPS, case.length), generator=generator)
    return ids.tolist()  # type: ignore[no-any-return]


def run_trl(case: Case, attention: str, watch: Watch) -> None:
    """TRL's SFTTrainer with Liger kernels and gradient checkpointing; without a GPU its own kernels and attention."""
    from peft import LoraConfig

    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, **case.lora)
    model = made(case, attention if device() == "cuda" else None)
    train(model, adapter, case, watch, use_liger_kernel=device() == "cuda", **checkpointing)


def run_unsloth(case: Case, watch: Watch) -> None:
    """Unsloth with its own checkpointing, in the same trainer; it reads the same weights from a folder."""
    from unsloth import FastLanguageModel  # Before transformers, which it changes.

    folder = tempfile.mkdtemp()
    made(case, None).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    torch.cuda.empty_cache()
    model, _ = FastLanguageModel.from_pretrained(
        folder, max_seq_length=case.length, dtype=torch.bfloat16, load_in_4bit=False, local_files_only=True
    )
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        target_modules=every,
        use_gradient_checkpointing="unsloth",
    )
    train(adapted, None, case, watch)


def tokenizer() -> Any:
    """Of three words: rows are token ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=words, **names)
    made.chat_template = "{{ messages }}"
    return made


def train(model: Any, adapter: Any, case: Case, watch: Watch, **settings: Any) -> None:
    """TRL's SFTTrainer over the rows of a case."""
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stepped()

        def on_log(self, *_: Any, logs: Mapping[str, float], **__: Any) -> None:
            watch.loss = float(logs.get("loss", watch.loss))

    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=watch.steps,
        per_device_train_batch_size=case.rows,
        gradient_accumulation_steps=1,  # Unsloth takes 2 where nothing is said.
        bf16=True,
        max_length=case.length,
        dataset_kwargs={"skip_prepare_dataset": True},
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        use_cpu=device() == "cpu",
        optim="adamw_torch_fused",
        learning_rate=1e-4,
        router_aux_loss_coef=0.0,
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset(InMemoryTable.from_pydict({"input_ids": rows_of(case)}), fingerprint="synthetic"),
        processing_class=tokenizer(),
        peft_config=adapter,
        callbacks=[Clock()],
    )
    watch.trains(trainer.model)
    trainer.train()
