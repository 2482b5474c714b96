"""Tiny models and a tiny tokenizer, made from nothing; and a run composed around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from pegbox.context import Context
from pegbox.plan import compose
from pegbox.rows import Batch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CORPUS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Two and 3 make 5; 12 and 34 make 46. Naïve wörds don't count.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random model: `tiny("Llama", tie_word_embeddings=True)`."""

    def make(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
        config_class = getattr(transformers, f"{family}Config")
        known = {*config_class().to_dict(), *config_class.attribute_map}
        config = config_class(**{name: value for name, value in {**SHAPE, **changes}.items() if name in known})
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():  # zero biases and unit norms would hide a parameter that is not used
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def folder(tmp_path: Path, tiny: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny Llama in bfloat16, as its author would publish it."""
    path = tmp_path / "tiny"
    tiny("Llama").to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def context(tmp_path: Path) -> Callable[..., Context]:
    """Composes a run: `context("name", hf={...})`; GGUF files are converted below the test's folder."""

    def make(name: str | Path, hf: dict[str, object] | None = None, **rest: object) -> Context:
        plugins = rest.pop("plugins", ["hf"])
        model = {"name": str(name), **rest.pop("model", {})}
        section = {"cache": str(tmp_path / "cache"), **(hf or {})}
        return compose({"model": model, "plugins": plugins, "hf": section, "output": str(tmp_path / "run"), **rest})

    return make


@pytest.fixture(scope="session")
def batch() -> Callable[..., Batch]:
    """Makes a batch of random tokens in which some positions are trained."""

    def make(rows: int = 2, tokens: int = 12, trained: float = 0.6, seed: int = 1) -> Batch:
        random = torch.Generator().manual_seed(seed)
        input_ids_BT = torch.randint(3, 300, (rows, tokens), generator=random)
        targets_BT = input_ids_BT.roll(-1, dims=1)
        targets_BT[torch.rand(rows, tokens, generator=random) > trained] = -100
        targets_BT[:, -1] = -100
        trained_N = (targets_BT.flatten() != -100).nonzero().flatten()
        return Batch(input_ids_BT=input_ids_BT, targets_BT=targets_BT, trained_N=trained_N)

    return make
