"""gpt-oss with LoRA on its attention: biases, sinks, windows, and plugins that patch the same layers beside this one.

Everything is random, biases and adapters too: what began at zero would hide what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import outcome
from pegbox import hooks
from pegbox.assembly import model_request
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model
from pegbox_kernels.lora_linear import linears
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Same = Callable[..., None]
Load = Callable[..., tuple[Model, PatchLog]]
SHAPE: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 40,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 4,  # All of them: no rounding sends a token elsewhere.
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 128,
    "initial_context_length": 128,
    "pad_token_id": 256,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BESIDE: dict[str, Mapping[str, Any]] = {
    "gpt-oss-attention": {},
    "scattermoe": {},
    "fused": {"experts": False, "rope": True},
    "activations": {"policy": "auto", "memory_gib": 1.0},
}
"""What gpt-oss is trained with; `activations` is last, as it wraps what the others made."""
ALONE: dict[str, dict[str, Mapping[str, Any]]] = {
    "by itself": {},
    "attention": {"gpt-oss-attention": {}},
    "rope": {"fused": {"experts": False, "rope": True}},
    "recomputed": {"activations": {"policy": "full"}},
    "all": BESIDE,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("gpt_oss", **SHAPE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("models") / "gpt-oss"
    model.save_pretrained(path)
    return path


@pytest.fixture
def load(folder: Path, tmp_path: Path) -> Load:
    """`load({"lora-kernels": {}, ...})`: the model with these plugins, adapted and patched as in a run."""

    def make(sections: Mapping[str, Mapping[str, Any]], dtype: str = "float32") -> tuple[Model, PatchLog]:
        config = {
            "model": {"name": str(folder), "dtype": dtype},
            "plugins": ["hf", "lora", *sections],
            "hf": {} if "gpt-oss-attention" in sections else {"attention": "eager"},
            "lora": {"r": 4, "alpha": 6, "targets": ATTENTION},
            "output": str(tmp_path / "run"),
            **{name: dict(section) for name, section in sections.items() if section},
        }
        ctx, log = compose(config), PatchLog()
        ctx.runtime = FakeRuntime()
        model = ctx.call(hooks.load_model, ctx, model_request(ctx))
        log.apply(model, ctx.each(hooks.patch_attention, ctx, model))
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
        model = ctx.call(hooks.apply_adapters, ctx, model)
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        for stage in ("adapted", "recompute"):
            log.apply(model, ctx.each(hooks.patch_modules, ctx, model, stage))
        model.module.train()
        return model, log

    return make


@pytest.mark.parametrize("beside", ALONE)
def test_losses_and_gradients_are_those_of_peft_beside_other_plugins(beside: str, load: Load, same: Same) -> None:
    model, log = load({"lora-kernels": {}, **ALONE[beside]})
    plain, _ = load(ALONE[beside])
    assert {applied.patch.slot for applied in log.applied} >= {"qkv", "linear"}
    assert all(".self_attn." in name for name, p in model.module.named_parameters() if p.requires_grad)
    same(model, plain)
    log.verify()


def test_in_bfloat16_gradients_are_as_near_to_the_truth_as_those_of_peft(load: Load) -> None:
    truth = outcome(load({})[0])[1]
    distances = {}
    for name, ours in {"ours": {"lora-kernels": {}}, "peft": {}}.items():
        model, _ = load({**ours, **BESIDE}, "bfloat16")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients = outcome(model)[1]
        assert gradients.keys() == truth.keys()
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
        distances[name] = sum((gradients[at] - exact).square().sum().item() for at, exact in truth.items()) ** 0.5
    assert distances["ours"] <= 1.2 * distances["peft"]


class Passes(TorchDispatchMode):
    """Counts casts, sums and scalings of whole activations, (T, N) with N above any rank."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.seen = tokens, {"_to_copy": 0, "add": 0, "mul": 0}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if name in self.seen and isinstance(result, Tensor) and result.numel() >= self.tokens * 32:
            self.seen[name] += 1
        return result


def passes(model: Model) -> dict[str, int]:
    with torch.autocast("cpu", dtype=torch.bfloat16), Passes(tiny_batches()[0].input_ids_BT.numel()) as found:
        outcome(model)
    return found.seen


def test_no_pass_over_activations_is_left_of_peft(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a layer: 16 casts, 4 sums and 6 of gradients, 8 scalings; the first has no gradient of its input."""
    # A GPU multiplies bf16 into fp32; on a CPU both are cast before, which is none of what is counted.
    monkeypatch.setattr(linears, "mm_wide", lambda one, other: (one @ other).float())
    beside = {name: section for name, section in BESIDE.items() if name != "activations"}
    ours, peft = passes(load({"lora-kernels": {}, **beside}, "bfloat16")[0]), passes(load(beside, "bfloat16")[0])
    assert peft["_to_copy"] - ours["_to_copy"] == 2 * 16 - 3 * 2
    assert peft["add"] - ours["add"] == 2 * (4 + 6) - 5
    assert peft["mul"] - ours["mul"] == 2 * 8
