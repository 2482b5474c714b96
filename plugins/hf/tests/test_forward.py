"""The one forward: compared with each model's own full forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import peft
import pytest
import torch
from pegbox.errors import RunError, UserError
from pegbox.patches import PatchLog
from pegbox.rows import Batch
from pegbox.types import Model, ModulePatch, Outputs
from pegbox_hf.forward import HEAD, compute
from pegbox_hf.head import TokenHead, find_rule
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Llama": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "Phi": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 4.0, "sliding_window": 4},
    "Gemma3Text": {"final_logit_softcapping": 3.0, "sliding_window": 4},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "HyperCLOVAX": {"logits_scaling": 3.0},
    "Mixtral": EXPERTS,
    "GptOss": {**EXPERTS, "sliding_window": 4},
}
Make = Callable[..., PreTrainedModel]
MakeBatch = Callable[..., Batch]


def with_head(module: PreTrainedModel) -> PreTrainedModel:
    module.add_module(HEAD, TokenHead(find_rule(module)))
    return module


def own_logits(module: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Logits of the trained positions from the model's own forward over everything."""
    return module(input_ids=batch.input_ids_BT, use_cache=False).logits.float().flatten(0, 1)[batch.trained_N]


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_entropy_and_logits_equal_the_models_own_forward(family: str, tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny(family, **FAMILIES[family])), batch()
    with torch.no_grad():
        outputs = compute(module, rows, frozenset({"logps", "entropy", "logits"}))
        logits_NV = own_logits(module, rows)
    targets_N = rows.targets_BT.flatten()[rows.trained_N]
    torch.testing.assert_close(outputs.logits_NV, logits_NV, rtol=1e-5, atol=1e-5)
    logps_N = -cross_entropy(logits_NV, targets_N, reduction="none")
    torch.testing.assert_close(outputs.logps_N, logps_N, rtol=1e-5, atol=1e-5)
    entropy_N = torch.distributions.Categorical(logits=logits_NV).entropy()
    torch.testing.assert_close(outputs.entropy_N, entropy_N, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite"])
def test_gradients_equal_those_of_the_models_own_loss(family: str, tiny: Make, batch: MakeBatch) -> None:
    ours, theirs, rows = with_head(tiny(family, **FAMILIES[family])), tiny(family, **FAMILIES[family]), batch()
    logps_N = compute(ours, rows, frozenset({"logps"})).logps_N
    (-logps_N.sum()).backward()
    cross_entropy(own_logits(theirs, rows), rows.targets_BT.flatten()[rows.trained_N], reduction="sum").backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_bfloat16_is_no_less_exact_than_the_models_own_head(tiny: Make, batch: MakeBatch) -> None:
    rows, changes = batch(rows=4, tokens=32), FAMILIES["Gemma2"]
    exact, half = with_head(tiny("Gemma2", **changes)), with_head(tiny("Gemma2", **changes).to(torch.bfloat16))
    exact.load_state_dict(half.state_dict())
    targets_N = rows.targets_BT.flatten()[rows.trained_N]
    with torch.no_grad():
        truth_N = compute(exact, rows, frozenset({"logps"})).logps_N
        ours_N = compute(half, rows, frozenset({"logps"})).logps_N
        own_N = own_logits(half, rows).log_softmax(-1).gather(-1, targets_N[:, None]).squeeze(-1)
    assert ours_N.dtype == torch.float32
    assert (ours_N - truth_N).abs().max() <= 2 * (own_N - truth_N).abs().max() + 1e-5


class Recorder:
    """Takes the place of the head through the seam that kernels use."""

    def __init__(self, head: torch.nn.Module) -> None:
        self.forward, self.shapes = head.forward, []

    def __call__(
        self, hidden_NH: torch.Tensor, projection: object, targets_N: torch.Tensor, needs: frozenset[str]
    ) -> Outputs:
        self.shapes.append((hidden_NH.shape, targets_N.shape))
        return self.forward(hidden_NH, projection, targets_N, needs)


def patched_head(module: PreTrainedModel) -> tuple[PatchLog, list[Recorder]]:
    made: list[Recorder] = []

    def replace_head(head: torch.nn.Module) -> Recorder:
        made.append(Recorder(head))
        return made[-1]

    patch = ModulePatch(slot="head", target=HEAD, replace=replace_head, reason="a faster head")
    model = Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute)
    log = PatchLog()
    log.apply(model, [("faster", [patch])])
    return log, made


def test_head_sees_only_the_trained_positions_and_can_be_patched(tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny("Llama")), batch()
    log, made = patched_head(module)
    compute(module, rows, frozenset({"logps"}))
    trained = rows.trained_tokens
    assert 0 < trained < rows.input_ids_BT.numel()
    assert made[0].shapes == [((trained, 32), (trained,))]
    log.verify()


def test_head_does_not_run_if_only_hidden_states_are_needed(tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny("Llama")), batch()
    _, made = patched_head(module)
    outputs = compute(module, rows, frozenset({"hidden"}))
    own = module.model(input_ids=rows.input_ids_BT).last_hidden_state
    torch.testing.assert_close(outputs.hidden_BTH, own)
    assert made[0].shapes == []
    assert outputs.logps_N is None


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "GptOss"])
def test_no_trained_token_still_hangs_on_every_parameter_that_runs(family: str, tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny(family, **FAMILIES[family])), batch(trained=0.0)
    assert rows.trained_tokens == 0
    outputs = compute(module, rows, frozenset({"logps", "entropy"}))
    (outputs.logps_N.sum() + outputs.entropy_N.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def packed(documents: list[torch.Tensor]) -> Batch:
    ids = torch.cat(documents)[None]
    targets = torch.cat([torch.cat([ids_T[1:], torch.tensor([-100])]) for ids_T in documents])[None]
    lengths = torch.tensor([0, *(len(ids_T) for ids_T in documents)])
    return Batch(
        input_ids_BT=ids,
        targets_BT=targets,
        trained_N=(targets.flatten() != -100).nonzero().flatten(),
        attention_mask_BT=torch.ones_like(ids),
        position_ids_BT=torch.cat([torch.arange(len(ids_T)) for ids_T in documents])[None],
        cu_seqlens_S=lengths.cumsum(0).to(torch.int32),
        max_seqlen=int(lengths.max()),
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_packed_documents_do_not_see_each_other(family: str, attention: str, tiny: Make) -> None:
    module = with_head(tiny(family, **FAMILIES[family]))
    module.set_attn_implementation(attention)
    random = torch.Generator().manual_seed(3)
    documents = [torch.randint(3, 300, (length,), generator=random) for length in (5, 1, 9)]
    with torch.no_grad():
        together = compute(module, packed(documents), frozenset({"logps"})).logps_N
        alone = [compute(module, packed([ids_T]), frozenset({"logps"})).logps_N for ids_T in documents]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_attention_that_needs_document_borders_gets_them(tiny: Make) -> None:
    module, rows, seen = with_head(tiny("Llama")), packed([torch.arange(3, 8), torch.arange(3, 6)]), []

    def borders(*inputs: object, **options: object) -> object:
        seen.append(
            {name: options.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        )
        return sdpa_attention_forward(*inputs, **options)

    AttentionInterface.register("borders", borders)
    AttentionMaskInterface.register("borders", sdpa_mask)
    module.set_attn_implementation("borders")
    compute(module, rows, frozenset({"hidden"}))
    assert len(seen) == 6, "two layers: two trials of packing, then the batch"
    for given in seen[4:]:
        assert given["cu_seq_lens_q"].tolist() == given["cu_seq_lens_k"].tolist() == [0, 5, 8]
        assert given["max_length_q"] == given["max_length_k"] == 5


def test_packing_without_positions_is_refused(tiny: Make) -> None:
    rows = replace(packed([torch.arange(3, 8), torch.arange(3, 6)]), position_ids_BT=None)
    with pytest.raises(RunError, match="position_ids"):
        compute(with_head(tiny("Llama")), rows, frozenset({"logps"}))


def test_padding_on_the_right_changes_nothing(tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny("Llama")), batch(rows=1)
    pad = torch.zeros(1, 5, dtype=torch.long)
    mask = torch.cat([torch.ones_like(rows.input_ids_BT), pad], 1)
    padded = Batch(
        input_ids_BT=torch.cat([rows.input_ids_BT, pad], 1),
        targets_BT=torch.cat([rows.targets_BT, pad - 100], 1),
        trained_N=rows.trained_N,
        attention_mask_BT=mask,
    )
    needs = frozenset({"logps"})
    torch.testing.assert_close(compute(module, padded, needs).logps_N, compute(module, rows, needs).logps_N)


def test_router_logits_are_the_models_own(tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny("Mixtral", **EXPERTS)), batch()
    ours = compute(module, rows, frozenset({"router_logits"})).router_logits
    own = module(input_ids=rows.input_ids_BT, output_router_logits=True).router_logits
    assert len(ours) == 2
    torch.testing.assert_close(ours, own)


@pytest.mark.parametrize(("need", "says"), [("values", "needs values"), ("router_logits", "returned none")])
def test_what_the_model_does_not_return_is_an_error(need: str, says: str, tiny: Make, batch: MakeBatch) -> None:
    with pytest.raises(RunError, match=says):
        compute(with_head(tiny("Llama")), batch(), frozenset({need}))


def test_a_peft_wrapper_changes_neither_names_nor_results(tiny: Make, batch: MakeBatch) -> None:
    rows, needs = batch(), frozenset({"logps"})
    expected = compute(with_head(tiny("Llama")), rows, needs).logps_N
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=True)
    wrapped = peft.get_peft_model(with_head(tiny("Llama")), config)
    torch.testing.assert_close(compute(wrapped, rows, needs).logps_N, expected)


def test_an_adapter_on_the_head_takes_part(tiny: Make, batch: MakeBatch) -> None:
    module, rows = with_head(tiny("Llama")), batch()
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(module, config)
    with torch.no_grad():
        ours = compute(wrapped, rows, frozenset({"logits"})).logits_NV
        torch.testing.assert_close(ours, own_logits(wrapped, rows), rtol=1e-5, atol=1e-5)


class Cubed(LlamaForCausalLM):
    """A head with a twist that no config field tells of."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def forward(self, **inputs: object) -> object:
        outputs = super().forward(**inputs)
        outputs.logits = outputs.logits**3
        return outputs


def test_a_head_that_does_something_unknown_is_refused(tiny: Make) -> None:
    with pytest.raises(UserError, match="Cubed does something to its logits"):
        find_rule(Cubed(tiny("Llama").config))


@pytest.mark.parametrize(("family", "without_mask"), [("Llama", True), ("Mixtral", True), ("Gemma2", False)])
def test_masks_are_left_out_exactly_where_causality_is_enough(
    family: str, without_mask: bool, tiny: Make, batch: MakeBatch
) -> None:
    module, rows = with_head(tiny(family, **FAMILIES[family])), batch()
    module.set_attn_implementation("sdpa")
    asked: list[str] = []
    network = module.model

    def seen(_module: object, _arguments: object, _named: object) -> None:
        asked.append(module.config._attn_implementation)

    network.register_forward_pre_hook(seen, with_kwargs=True)
    compute(module, rows, frozenset({"hidden"}))
    assert asked == ["sdpa_right_padded" if without_mask else "sdpa"]
    assert module.config._attn_implementation == "sdpa"
