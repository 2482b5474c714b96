"""A model computes the same with the plugin and without: outputs, every gradient, whole trainings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_models import adapted, outcome, patch
from pegbox import hooks
from pegbox.errors import ConfigError, PatchError, PluginError, RunError
from pegbox.patches import PatchLog
from pegbox.plan import compose
from pegbox.testing.tiny import PAD, compute, tiny_batches, tiny_model
from pegbox.types import Model, ModulePatch
from torch import nn

Same = Callable[..., None]


def network(kind: str, **changes: Any) -> Model:
    """Another architecture of transformers, tiny."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.AutoConfig.for_model(kind, **{**shape, "pad_token_id": PAD, **changes})
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).train()
    return Model(module=module, name=kind, base=kind, format="transformers", compute=compute)


KINDS: dict[str, dict[str, Any]] = {
    "all linear": {},
    "rank of a power of two": {"r": 16},
    "rsLoRA": {"use_rslora": True},
    "ranks by module": {"rank_pattern": {"q_proj": 7, "v_proj": 1, "up_proj": 40}, "alpha_pattern": {"o_proj": 3}},
    "queries and values": {"targets": ["q_proj", "v_proj"]},
    "queries alone": {"targets": ["q_proj", "o_proj"]},
    "down alone": {"targets": ["down_proj"]},
    "trained biases": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "DoRA": {"use_dora": True},
    "dropout": {"dropout": 0.3},
    "some layers": {"layers": [1]},
    "a saved head": {"modules_to_save": ["lm_head"]},
    "an adapted head": {"targets": ["lm_head", "up_proj"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_every_gradient_are_those_of_peft(kind: str, same: Same) -> None:
    base = {"attention_bias": True, "mlp_bias": True}
    model, plain = (adapted(tiny_model(**base), **KINDS[kind]) for _ in range(2))
    log = patch(model)
    if kind == "dropout":
        # Masks are drawn in another order while it trains; evaluation draws none.
        plain.module.eval()
        model.module.eval()
    same(model, plain)
    log.verify()


ARCHITECTURES = {"qwen3": {}, "gemma2": {}, "mistral": {}, "phi3": {"pad_token_id": 0}, "gpt2": {}}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures_compute_the_same(kind: str, same: Same) -> None:
    model, plain = (adapted(network(kind, **ARCHITECTURES[kind])) for _ in range(2))
    log = patch(model)
    slots = {applied.patch.slot for applied in log.applied}
    assert slots == ({"linear"} if kind in ("phi3", "gpt2") else {"qkv", "mlp", "linear"})
    same(model, plain)
    log.verify()


def test_masks_of_dropout_are_those_of_peft_where_one_layer_draws(same: Same) -> None:
    """One adapted layer: the same draws, so the same numbers while it trains."""
    model, plain = (adapted(targets=["down_proj"], dropout=0.3) for _ in range(2))
    patch(model)
    dropped, kept = outcome(model), outcome(plain)
    plain.module.eval()
    assert not torch.allclose(outcome(plain)[0], kept[0])
    torch.testing.assert_close(dropped[0], kept[0], rtol=1e-5, atol=1e-5)


def trained(model: Model, steps: int = 4) -> list[torch.Tensor]:
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(steps):
        logps = model.compute(model.module, tiny_batches(seed=step)[0], frozenset({"logps"})).logps_N
        (-logps.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("settings", [{}, {"mlp_keeps": "input"}, {"qkv": False}])
def test_several_steps_of_training_end_where_they_end_without_it(settings: dict[str, Any]) -> None:
    model, plain = adapted(), adapted()
    patch(model, **settings)
    torch.testing.assert_close(trained(model), trained(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [{}, {"reentrant": True}, {"modules": r".*\.self_attn"}, {"modules": r".*\.mlp"}])
def test_recomputing_changes_nothing(recompute: dict[str, Any], same: Same) -> None:
    model, plain = adapted(), adapted()
    log = patch(model)
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora", "activations"], "activations": recompute})
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    same(model, plain)
    log.verify()


def test_recomputing_draws_the_same_masks() -> None:
    model, log = adapted(dropout=0.3), None
    log = patch(model)
    expected = outcome(model)
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora", "activations"]})
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "recompute"))
    torch.testing.assert_close(outcome(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_as_near_to_the_truth_as_those_of_peft(dtype: torch.dtype) -> None:
    models = {name: adapted() for name in ("ours", "peft", "truth")}
    patch(models["ours"])
    truth = outcome(models["truth"])[1]
    gradients = {}
    for name in ("ours", "peft"):
        for layer in models[name].module.modules():
            if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
                layer.weight.data = layer.weight.data.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients[name] = outcome(models[name])[1]

    def distance(found: dict[str, torch.Tensor]) -> float:
        return sum((found[name] - gradient).square().sum().item() for name, gradient in truth.items()) ** 0.5

    assert gradients["ours"].keys() == truth.keys()
    assert {gradient.dtype for gradient in gradients["ours"].values()} == {torch.float32}
    assert distance(gradients["ours"]) <= 1.5 * distance(gradients["peft"])


def test_a_disabled_adapter_is_the_base_alone_and_a_merged_one_itself() -> None:
    model, plain = adapted(), adapted()
    patch(model)
    layers = [[part for part in one.module.modules() if hasattr(part, "lora_A")] for one in (model, plain)]
    with torch.no_grad():
        whole = outcome_of(plain)
        for state in ("off", "on", "merged", "unmerged"):
            for layer in (*layers[0], *layers[1]):
                {"off": lambda one: one.enable_adapters(False), "on": lambda one: one.enable_adapters(True)}.get(
                    state, lambda one, state=state: one.merge() if state == "merged" else one.unmerge()
                )(layer)
            found, expected = outcome_of(model), outcome_of(plain)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert torch.allclose(found, whole, atol=1e-4) is (state != "off")


def outcome_of(model: Model) -> torch.Tensor:
    return model.compute(model.module, tiny_batches()[0], frozenset({"logits"})).logits_NV


def test_several_active_adapters_are_computed_by_peft(same: Same) -> None:
    import peft

    models = [adapted(), adapted()]
    for model in models:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "gate_proj", "o_proj"], init_lora_weights=False)
        torch.manual_seed(2)
        peft.inject_adapter_in_model(config, model.module, "second")
        for layer in (part for part in model.module.modules() if hasattr(part, "lora_A")):
            layer.set_adapter([name for name in ("default", "second") if name in layer.lora_A])
    patch(models[0])
    same(*models)


def test_generation_with_a_cache_gives_the_same_tokens() -> None:
    model, plain = adapted(), adapted()
    patch(model)
    ids = tiny_batches()[0].input_ids_BT[:1, :6]
    with torch.inference_mode():
        torch.testing.assert_close(outcome_of(model), outcome_of(plain), rtol=1e-5, atol=1e-5)
    tokens = [
        one.module.eval().generate(ids, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(ids))
        for one in (model, plain)
    ]
    assert torch.equal(*tokens)


def test_undo_leaves_no_trace() -> None:
    model, plain = adapted(), adapted()
    log = patch(model)
    log.undo()
    assert not any("forward" in vars(part) for part in model.module.modules())
    assert torch.equal(outcome(model)[0], outcome(plain)[0])


def test_each_switch_leaves_its_part_to_peft() -> None:
    slots = {"qkv": {"qkv"}, "mlp": {"mlp"}, "o": {"linear"}}
    for part, gone in slots.items():
        applied = {one.patch.slot for one in patch(adapted(), **{part: False}).applied}
        assert applied == {"qkv", "mlp", "linear"} - gone


def test_the_input_of_a_group_is_multiplied_once_with_all_of_its_factors() -> None:
    """16 ranks: 4 for each of q, k, v are 12 rows of one product, per layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        shapes: list[tuple[int, ...]]

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                self.shapes.append(tuple(result.shape))
            return result

    model = adapted()
    patch(model)
    products = Products()
    products.shapes = []
    with products, torch.no_grad():
        outcome_of(model)
    rows = tiny_batches()[0].input_ids_BT.numel()
    assert products.shapes.count((rows, 12)) == 2
    assert products.shapes.count((rows, 8)) == 2


class Crossed(nn.Module):
    """An attention whose keys and values see another tensor."""

    def __init__(self, attention: nn.Module, copies: bool) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, getattr(attention, name))
        self.copies = copies

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        other = hidden_states.clone() if self.copies else hidden_states
        if not self.copies:
            query = self.q_proj(hidden_states)
            other.mul_(1.0)
        else:
            query = self.q_proj(hidden_states)
        return self.o_proj(query + (self.k_proj(other) + self.v_proj(other)).repeat(1, 1, 2)), None


@pytest.mark.parametrize("copies", [True, False])
def test_other_inputs_within_an_attention_are_an_error_that_names_the_switch(copies: bool, same: Same) -> None:
    def crossed() -> Model:
        model = tiny_model()
        for layer in model.module.model.layers:
            layer.self_attn = Crossed(layer.self_attn, copies)
        return adapted(model)

    model = crossed()
    patch(model)
    with torch.no_grad(), pytest.raises(RunError, match=r"did not call [\s\S]*k_proj[\s\S]*qkv to false"):
        outcome_of(model)
    if copies:
        model = crossed()
        patch(model, qkv=False)
        same(model, crossed())


def test_an_exception_in_an_attention_leaves_nothing_behind(same: Same) -> None:
    model, plain = adapted(), adapted()
    patch(model)
    attention = model.module.model.layers[0].self_attn
    values = attention.v_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        outcome(model)
    values.remove()
    same(model, plain)


def test_an_mlp_that_is_no_plain_gated_one_is_served_layer_by_layer(same: Same) -> None:
    class Clamped(type(tiny_model().module.model.layers[0].mlp)):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=0.1)) * self.up_proj(x))

    def clamped() -> Model:
        model = tiny_model()
        for layer in model.module.model.layers:
            layer.mlp.__class__ = Clamped
        return adapted(model)

    model = clamped()
    log = patch(model)
    assert {applied.patch.slot for applied in log.applied} == {"qkv", "linear"}
    same(model, clamped())
    log.verify()


def test_an_mlp_whose_activation_has_no_kernel_is_served_layer_by_layer() -> None:
    log = patch(adapted(tiny_model(hidden_act="relu")))
    assert {applied.patch.slot for applied in log.applied} == {"qkv", "linear"}


@pytest.mark.slow
def test_a_compiled_layer_is_one_graph_and_computes_the_same(same: Same) -> None:
    model, plain = adapted(), adapted()
    log = patch(model)
    settings = {"backend": "aot_eager", "fullgraph": True}
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora", "compile"], "compile": settings})
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "compile"))
    same(model, plain)


def four_bits(model: Model) -> Model:
    """The same weights, held by bitsandbytes in NF4."""
    bnb = pytest.importorskip("bitsandbytes")
    for part in list(model.module.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, nn.Linear) and name != "lm_head":
                held = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                held.load_state_dict({"weight": layer.weight.data})
                setattr(part, name, held.to("cpu"))
    model.module.is_loaded_in_4bit = True
    return model


def test_a_base_in_4_bits_computes_the_same(same: Same) -> None:
    model, plain = (adapted(four_bits(tiny_model())) for _ in range(2))
    log = patch(model)
    assert {applied.patch.slot for applied in log.applied} == {"qkv", "mlp", "linear"}
    same(model, plain)
    log.verify()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RunError, match="compute_dtype to bfloat16"):
        outcome(model)


def test_two_plugins_on_one_mlp_are_an_error_that_names_both() -> None:
    model = adapted()

    def other(module: nn.Module) -> Callable[..., Any]:
        original = module.forward
        return lambda x: original(x)

    log = PatchLog()
    log.apply(model, [("fused", [ModulePatch(slot="mlp", target="model.layers.*.mlp", replace=other, reason="r")])])
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora", "lora-kernels"]})
    with pytest.raises(PatchError, match=r"fused[\s\S]*lora-kernels|lora-kernels[\s\S]*fused"):
        log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "adapted"))


@pytest.mark.parametrize("mlp", [True, False])
def test_an_mlp_that_another_plugin_replaced_before_is_an_error_unless_it_is_switched_off(
    mlp: bool, same: Same
) -> None:
    class Replaced(nn.Module):
        def __init__(self, mlp: nn.Module) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    model, log = tiny_model(), PatchLog()
    log.apply(model, [("fused", [ModulePatch(slot="mlp", target="model.layers.*.mlp", replace=Replaced, reason="r")])])
    model = adapted(model)
    settings = {} if mlp else {"mlp": False}
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora", "lora-kernels"], "lora-kernels": settings})
    answers = ctx.each(hooks.patch_modules, ctx, model, "adapted")
    if mlp:
        with pytest.raises(PatchError, match=r"fused[\s\S]*lora-kernels|lora-kernels[\s\S]*fused"):
            log.apply(model, answers)
    else:
        log.apply(model, answers)
        same(model, adapted())


def test_without_an_adapter_the_error_says_what_to_add() -> None:
    with pytest.raises(ConfigError, match=r"has no adapted linear layer[\s\S]*Add lora to plugins"):
        patch(tiny_model())


@pytest.mark.parametrize(
    ("lora", "settings", "says"),
    [
        ({"use_dora": True, "dropout": 0.1}, {}, "DoRA with dropout"),
        ({"targets": ["q_proj"]}, {"mlp": True}, r"mlp is true, .* Adapted here: qkv \(2\)"),
        ({"targets": ["q_proj"]}, {"qkv": False}, "every part switched off that this model has"),
    ],
)
def test_what_cannot_be_computed_is_refused_at_the_start(lora: dict, settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(" .* ", r"[\s\S]*")):
        patch(adapted(**lora), **settings)


def test_layers_of_other_kinds_and_hooks_inside_are_refused_by_name() -> None:
    model = adapted()
    layer = model.module.model.layers[1].self_attn.q_proj
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.q_proj[\s\S]*base_layer has a hook"):
        patch(model)
    model = adapted()
    model.module.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(PluginError, match=r"up_proj has a hook"):
        patch(model)
    model = adapted()
    model.module.model.layers[0].mlp.up_proj.__class__ = type(
        "GPTQLoraLinear", (type(layer),), {"__module__": "peft.tuners.lora.gptq"}
    )
    with pytest.raises(ConfigError, match=r"GPTQLoraLinear on Linear, for which there is no kernel"):
        patch(model)


def test_only_the_policy_is_patched() -> None:
    ctx = compose({"model": {"name": "tiny"}, "plugins": ["lora-kernels"]})
    frozen = Model(**{**vars(tiny_model()), "role": "reference"})
    assert ctx.each(hooks.patch_modules, ctx, frozen, "adapted") == [("lora-kernels", [])]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"qkv": False, "o": False, "mlp": False, "other": False}, "nothing would be done"),
        ({"mlp": False, "mlp_keeps": "input"}, "remove mlp_keeps"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose({"model": {"name": "tiny"}, "plugins": ["lora-kernels"], "lora-kernels": settings})
