"""QLoRA training against transformers and PEFT, exact resume, and what the export opens in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import peft
import pytest
import torch
from pegbox import hooks
from pegbox.context import Context
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Batch, Example
from pegbox.run import execute
from pegbox.testing.tiny import tiny_batches
from pegbox.types import ExportRequest, Model
from pegbox_bnb.config import BnbConfig
from pegbox_bnb.inspection import quantized_layers
from pegbox_bnb.quantization import quantization
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

Load = Callable[..., tuple[Context, Model]]
STEPS = 5
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def by_peft(base: Path, kind: str, start: dict[str, torch.Tensor], device: str) -> PreTrainedModel:
    """transformers' and PEFT's own QLoRA, with adapter weights that begin as ours."""
    config = quantization(BnbConfig(kind=kind))
    network = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32, device_map={"": device}
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=32, target_modules=names))
    own = dict(wrapped.get_base_model().named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            own[name].copy_(value)
    return wrapped


def batches() -> list[Batch]:
    return (tiny_batches() * STEPS)[:STEPS]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=ON_GPU)])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_five_steps_equal_those_of_transformers_and_peft(kind: str, device: str, base: Path, load: Load) -> None:
    _, model = load(kind=kind, adapt=True, device=device)
    module = model.module.to(device).train()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: layer.weight.data.clone() for name, layer in quantized_layers(module).items()}
    theirs = by_peft(base, kind, {name: p.detach().clone() for name, p in trained.items()}, device)
    theirs = theirs.to(device).train()
    ours_optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for batch in (made.to(torch.device(device)) for made in batches()):
        loss = -model.compute(module, batch, frozenset({"logps"})).logps_N.mean()
        logits_NV = theirs(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits.flatten(0, 1)
        targets_N = batch.targets_BT.flatten()[batch.trained_N]
        expected = cross_entropy(logits_NV[batch.trained_N].float(), targets_N)
        for value, optimizer in ((loss, ours_optimizer), (expected, their_optimizer)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        seen.append((float(loss.detach()), float(expected.detach())))
    ours, others = zip(*seen, strict=True)
    assert ours == pytest.approx(others, rel=2e-3 if kind == "int8" else 1e-4)
    assert len(set(ours)) == STEPS, "the losses move"
    for name, layer in quantized_layers(module).items():
        assert torch.equal(layer.weight.data, frozen[name]), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_after_an_evaluation_are_those_before_it(kind: str, load: Load) -> None:
    _, model = load(kind=kind, adapt=True)
    module, batch = model.module.train(), batches()[0]
    trained = [p for p in module.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        loss = -model.compute(module.train(), batch, frozenset({"logps"})).logps_N.mean()
        return list(torch.autograd.grad(loss, trained))

    before = gradients()
    with torch.no_grad():
        model.compute(module.eval(), batch, frozenset({"logps"}))
        module(batch.input_ids_BT[:1, :1])
    assert any(gradient.any() for gradient in before)
    for first, second in zip(before, gradients(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_evaluation_computes_what_training_computes(load: Load) -> None:
    """Of DoRA, which reads the base's weights besides multiplying by them."""
    _, model = load()
    kind = peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["gate_proj", "q_proj"])
    module = peft.get_peft_model(model.module, kind)
    ids = batches()[0].input_ids_BT
    expected = module.train()(ids).logits.detach()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(module.eval()(ids).logits, expected)


def test_what_is_exported_opens_in_peft_on_the_quantized_base(base: Path, tmp_path: Path, load: Load) -> None:
    ctx, model = load(adapt=True)
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    config = quantization(BnbConfig())
    network = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    # Plain transformers repacks the base on some CPUs for inference, in bfloat16; in training it does not.
    opened = peft.PeftModel.from_pretrained(network, tmp_path / "out").train()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(ids).logits, model.module.eval()(ids).logits)


class Rows:
    """Brings twelve rows, as a data plugin does."""

    split, fingerprint = "train", "twelve"

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return self if split == "train" else None

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Example:
        ids = [(7 * index + 3 * place) % 256 for place in range(5 + index % 4)]
        return Example(input_ids=ids, labels=ids)

    def describe(self, index: int) -> str:
        return f"row {index}"


def trained(base: Path, folder: Path, steps: int, **keys: Any) -> None:
    config = {
        "model": {"name": str(base)},
        "plugins": ["hf", "rows", "bnb", "lora", "sft", "adamw", "trainer"],
        "lora": {"r": 4},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": steps, "micro_batch": 2, "log_every": 1, "save_every": 2, "progress": "none"},
        "output": str(folder),
        **keys,
    }
    execute(compose(config, instances={"rows": Rows()}))


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "whole", 4)
    stopped = tmp_path / "resumed"
    trained(base, stopped, 4)
    rmtree(stopped / "checkpoints" / "step-00000004")
    (stopped / "adapter_model.safetensors").unlink()
    trained(base, stopped, 4, resume="auto")
    left, right = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", stopped))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert any(bool(value.any()) for name, value in left.items() if "lora_B" in name)
