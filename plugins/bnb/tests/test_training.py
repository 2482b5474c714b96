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
from pegbox.run import execute
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Batch, Example, ExportRequest, Model
from pegbox_bnb.config import BnbConfig
from pegbox_bnb.inspection import quantized_layers
from pegbox_bnb.quantization import quantization
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel

Load = Callable[..., tuple[Context, Model]]
STEPS = 5


def by_peft(base: Path, kind: str, start: dict[str, torch.Tensor]) -> PreTrainedModel:
    """transformers' and PEFT's own QLoRA, with adapter weights that begin as ours."""
    config = quantization(BnbConfig(kind=kind))
    network = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=32, target_modules=names))
    own = dict(wrapped.get_base_model().named_parameters())
    with torch.no_grad():
        for name, value in start.items():
            own[name].copy_(value)
    return wrapped


def batches() -> list[Batch]:
    return (tiny_batches() * STEPS)[:STEPS]


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_five_steps_equal_those_of_transformers_and_peft(kind: str, base: Path, load: Load) -> None:
    _, model = load(kind=kind, adapt=True)
    module = model.module.train()
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    frozen = {name: layer.weight.data.clone() for name, layer in quantized_layers(module).items()}
    theirs = by_peft(base, kind, {name: p.detach().clone() for name, p in trained.items()}).train()
    ours_optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for batch in batches():
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


def test_what_is_exported_opens_in_peft_on_the_quantized_base(base: Path, tmp_path: Path, load: Load) -> None:
    ctx, model = load(adapt=True)
    (tmp_path / "out").mkdir()
    ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=tmp_path / "out", format="peft"))
    config = quantization(BnbConfig())
    network = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    opened = peft.PeftModel.from_pretrained(network, tmp_path / "out")
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
