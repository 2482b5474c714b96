"""LoRA on experts beside the product: the same as PEFT's changed weight, and no weight is ever changed."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from mixtures import EXPERTS, assembled, folder, gradients, logps
from peft.tuners.lora.layer import ParamWrapper
from pegbox.errors import PluginError
from pegbox.testing.tiny import tiny_batches
from pegbox.types import Model
from pegbox_scattermoe.adapters import factors_of, lora_of
from pegbox_scattermoe.adapters import patches as adapter_patches
from torch.utils._python_dispatch import TorchDispatchMode

BATCH = tiny_batches(rows=4)[0]


def pair(kind: str, plugins: tuple[str, ...] = (), **lora: Any) -> tuple[Model, Model]:
    """PEFT's own way, and ours, with the same factors."""
    lora = {"r": 4, "alpha": 8.0, "targets": ["q_proj", "o_proj"], "parameters": EXPERTS, **lora}
    sections: dict[str, Any] = {"lora": lora}
    plain, _ = assembled(kind, ["lora", *plugins], **sections)
    ours, log = assembled(kind, ["lora", "scattermoe", *plugins], **sections)
    assert logps(ours, BATCH).requires_grad
    log.verify()
    return plain, ours


def same(plain: Model, ours: Model) -> None:
    torch.testing.assert_close(logps(ours, BATCH), logps(plain, BATCH), rtol=1e-5, atol=1e-5)
    expected, got = gradients(plain, BATCH), gradients(ours, BATCH)
    assert got.keys() == expected.keys()
    assert any("experts" in name and "lora_" in name for name in got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", [EXPERTS, EXPERTS[:1], EXPERTS[1:], EXPERTS[::-1]], ids="+".join)
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_losses_and_gradients_are_those_of_peft(kind: str, parameters: list[str]) -> None:
    same(*pair(kind, parameters=parameters))


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 3.0}},
        {"r": 1},
        {"layers": [1]},
    ],
    ids=str,
)
def test_settings_of_lora_are_respected(lora: dict[str, Any]) -> None:
    same(*pair("gpt_oss", **lora))


def test_several_steps_end_at_the_factors_of_peft() -> None:
    ends = []
    for model in pair("gpt_oss"):
        trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
        losses = []
        for batch in tiny_batches(rows=4) * 4:
            loss = -logps(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), {name: p.detach() for name, p in trained.items()}))
    torch.testing.assert_close(ends[1][0], ends[0][0], rtol=1e-4, atol=1e-4)
    assert ends[0][0][-1] < ends[0][0][0]


def test_recomputed_layers_have_the_same_gradients() -> None:
    kept, recomputed = (pair("gpt_oss", plugins)[1] for plugins in ((), ("activations",)))
    torch.testing.assert_close(gradients(recomputed, BATCH), gradients(kept, BATCH), rtol=1e-5, atol=1e-6)


def test_float32_factors_on_a_bfloat16_base_are_trained_in_float32() -> None:
    sections = {"lora": {"r": 4, "parameters": EXPERTS, "targets": ["q_proj"]}}
    exact = logps(assembled("gpt_oss", ["lora"], **sections)[0], BATCH)
    errors = []
    for plugins in (["lora"], ["lora", "scattermoe"]):
        model, _ = assembled("gpt_oss", plugins, dtype="bfloat16", **sections)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append((logps(model, BATCH) - exact).abs().mean())
            found = gradients(model, BATCH)
        assert {gradient.dtype for gradient in found.values()} == {torch.float32}
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert 0 < errors[1] <= 2 * errors[0] + 1e-3


class Made(TorchDispatchMode):
    """How many tensors of a shape operations made."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.made = shapes, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and tuple(value.shape) in self.shapes:
                own = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
                self.made += value.untyped_storage().data_ptr() not in own
        return result


def test_no_tensor_as_large_as_the_experts_is_made() -> None:
    plain, ours = pair("gpt_oss")
    shapes = {(4, 32, 96), (4, 48, 32), (4, 96, 32), (4, 32, 48)}
    made = []
    for model in (plain, ours):
        with Made(shapes) as counted:
            gradients(model, BATCH)
        made.append(counted.made)
    assert made[0] > 0
    assert made[1] == 0


def wrappers(model: Model) -> list[Any]:
    return [part for part in model.module.modules() if isinstance(part, ParamWrapper)]


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe"])
def test_factors_make_the_change_of_the_weight_that_peft_makes(kind: str) -> None:
    for wrapper in wrappers(pair(kind)[1]):
        a, b = factors_of(wrapper, "default")
        change = torch.einsum("eor,eri->eio" if wrapper.get_base_layer().is_transposed else "eor,eri->eoi", b, a)
        expected = wrapper.get_delta_weight("default")
        torch.testing.assert_close(change * wrapper.scaling["default"], expected)


def test_factors_of_an_adapter_made_for_the_other_layout_change_places() -> None:
    model, _ = assembled("qwen3_moe", ["scattermoe"])
    experts: Any = model.module.get_submodule("model.layers.0.mlp.experts")
    experts.is_transposed = True
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["0.mlp.experts.down_proj"], init_lora_weights=False
    )
    peft.inject_adapter_in_model(config, model.module, "default")
    experts.is_transposed = False
    (wrapper,) = wrappers(model)
    a, b = factors_of(wrapper, "default")
    change = torch.einsum("eor,eri->eoi", b, a) * wrapper.scaling["default"]
    torch.testing.assert_close(change, wrapper.get_delta_weight("default"))


def test_with_adapters_off_the_base_answers() -> None:
    plain, ours = pair("gpt_oss")
    base = logps(assembled("gpt_oss", [])[0], BATCH)
    for model in (plain, ours):
        for switch in (True, False):
            for part in model.module.modules():
                if isinstance(part, peft.tuners.tuners_utils.BaseTunerLayer):
                    part.enable_adapters(not switch)
            assert torch.allclose(logps(model, BATCH), base, atol=1e-5) is switch
    for wrapper in wrappers(ours):
        wrapper.enable_adapters(False)
        assert lora_of(wrapper) is None


def test_merged_adapters_answer_as_before_and_come_off_again() -> None:
    _, ours = pair("qwen3_moe")
    before = logps(ours, BATCH)
    weights = [wrapper.get_param().clone() for wrapper in wrappers(ours)]
    for wrapper in wrappers(ours):
        wrapper.merge()
        assert lora_of(wrapper) is None
    torch.testing.assert_close(logps(ours, BATCH), before, rtol=1e-4, atol=1e-4)
    for wrapper in wrappers(ours):
        wrapper.unmerge()
    torch.testing.assert_close(logps(ours, BATCH), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close([wrapper.get_param() for wrapper in wrappers(ours)], weights)


def test_several_active_adapters_add_up() -> None:
    models = pair("gpt_oss")
    for model in models:
        config = peft.LoraConfig(
            r=3, lora_alpha=5, target_modules=[], target_parameters=EXPERTS, init_lora_weights=False
        )
        torch.manual_seed(5)
        peft.inject_adapter_in_model(config, model.module, "second")
        for wrapper in wrappers(model):
            wrapper.set_adapter(["default", "second"])
    same(*models)
    for model in models:
        for wrapper in wrappers(model):
            wrapper.set_adapter("second")
    same(*models)


def test_undone_patches_leave_the_way_of_peft() -> None:
    plain, _ = pair("mixtral")
    ours, log = assembled(
        "mixtral",
        ["lora", "scattermoe"],
        lora={"r": 4, "alpha": 8.0, "targets": ["q_proj", "o_proj"], "parameters": EXPERTS},
    )
    log.undo()
    assert not any("forward" in vars(wrapper) for wrapper in wrappers(ours))
    same(plain, ours)


def test_an_adapter_on_something_else_of_the_experts_is_refused() -> None:
    with pytest.raises(PluginError, match=r"adapter on gate_up_proj_bias"):
        assembled("gpt_oss", ["lora", "scattermoe"], lora={"r": 2, "parameters": ["experts.gate_up_proj_bias"]})


def test_adapters_beside_the_experts_need_no_second_patch() -> None:
    model, log = assembled("gpt_oss", ["lora", "scattermoe"], lora={"r": 2, "targets": ["q_proj"]})
    assert adapter_patches(model) == []
    gradients(model, BATCH)
    log.verify()


def test_experts_that_are_trained_whole_beside_an_adapter_are_computed_too() -> None:
    lora = {"lora": {"r": 2, "targets": ["q_proj"], "modules_to_save": ["mlp.experts"]}}
    plain, _ = assembled("qwen3_moe", ["lora"], **lora)
    ours, log = assembled("qwen3_moe", ["lora", "scattermoe"], **lora)
    expected, got = gradients(plain, BATCH), gradients(ours, BATCH)
    assert any("modules_to_save.default.gate_up_proj" in name for name in got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    log.verify()


def test_the_adapter_opens_in_peft_and_answers_the_same() -> None:
    from peft import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    _, ours = pair("gpt_oss")
    expected = logps(ours, BATCH)
    base = AutoModelForCausalLM.from_pretrained(folder("gpt_oss"))
    config = ours.module.peft_config["default"]
    plain = peft.get_peft_model(base, config)
    weights = get_peft_model_state_dict(ours.module)
    found = peft.set_peft_model_state_dict(
        plain, {f"base_model.model.{name}": value for name, value in weights.items()}
    )
    assert not found.unexpected_keys
    logits = plain(input_ids=BATCH.input_ids_BT, attention_mask=BATCH.attention_mask_BT).logits
    flat = logits.flatten(0, 1)[BATCH.trained_N].log_softmax(-1)
    got = flat.gather(-1, BATCH.targets_BT.flatten()[BATCH.trained_N].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
