"""Documents packed into one row do not see each other; what cannot keep that promise is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pegbox.errors import RunError, UserError
from pegbox.rows import Batch
from pegbox_hf.attention import DOCUMENTS, facts_of
from pegbox_hf.forward import HEAD, compute
from pegbox_hf.head import LogitRule, TokenHead
from pegbox_hf.traits import traits_of
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "GptOss": {**EXPERTS, "sliding_window": 4},
}
BACKENDS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa", "flex_attention")
    if family != "GptOss" or attention == "eager"  # its sinks: no sdpa in transformers, flex attention on GPUs only
]
HIDDEN = frozenset({"hidden"})
Make = Callable[..., PreTrainedModel]


@pytest.fixture(autouse=True)
def _flex_attention_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same mathematics without the minutes of compilation."""
    monkeypatch.setattr(
        "transformers.integrations.flex_attention.WrappedFlexAttention", lambda training: lambda: flex_attention
    )

    def block_mask(*arguments: object, _compile: bool = False, **named: object) -> object:
        return create_block_mask(*arguments, **named)

    monkeypatch.setattr("transformers.masking_utils.create_block_mask", block_mask)


def with_attention(make: Make, family: str, attention: str) -> PreTrainedModel:
    module = make(family, **FAMILIES.get(family, {}))
    module.add_module(HEAD, TokenHead(LogitRule()))
    module.set_attn_implementation(attention)
    return module


def packed(*rows: list[int], seed: int = 3) -> Batch:
    """Rows of documents of these lengths; every row has the same number of tokens."""
    random = torch.Generator().manual_seed(seed)
    tokens = sum(rows[0])
    ids_BT = torch.randint(3, 300, (len(rows), tokens), generator=random)
    lengths = [length for row in rows for length in row]
    return Batch(
        input_ids_BT=ids_BT,
        targets_BT=torch.full_like(ids_BT, -100),
        trained_N=torch.zeros(0, dtype=torch.long),
        position_ids_BT=torch.cat([torch.arange(length) for length in lengths]).view(len(rows), tokens),
        cu_seqlens_S=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        max_seqlen=max(lengths),
    )


@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_changing_a_document_changes_no_other_one(family: str, attention: str, tiny: Make) -> None:
    module, batch = with_attention(tiny, family, attention), packed([5, 9, 1, 1], [8, 1, 4, 3])
    ids_BT = batch.input_ids_BT.clone()
    ids_BT[0, :5] += 1
    ids_BT[1, 8:13] += 1
    with torch.no_grad():
        before_BTH = compute(module, batch, HIDDEN).hidden_BTH
        after_BTH = compute(module, replace(batch, input_ids_BT=ids_BT), HIDDEN).hidden_BTH
    moved_BT = (before_BTH != after_BTH).any(-1)
    assert moved_BT[0, :5].all()
    assert moved_BT[1, 8:13].all()
    torch.testing.assert_close(after_BTH[0, 5:], before_BTH[0, 5:], rtol=0, atol=1e-6)
    torch.testing.assert_close(after_BTH[1, :8], before_BTH[1, :8], rtol=0, atol=1e-6)
    torch.testing.assert_close(after_BTH[1, 13:], before_BTH[1, 13:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_a_packed_document_is_computed_as_if_it_were_alone(family: str, attention: str, tiny: Make) -> None:
    module, batch = with_attention(tiny, family, attention), packed([5, 9, 2])
    alone = Batch(
        input_ids_BT=batch.input_ids_BT[:, 5:14], targets_BT=batch.targets_BT[:, 5:14], trained_N=batch.trained_N
    )
    with torch.no_grad():
        together_TH = compute(module, batch, HIDDEN).hidden_BTH[0, 5:14]
        alone_TH = compute(module, alone, HIDDEN).hidden_BTH[0]
    torch.testing.assert_close(together_TH, alone_TH, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_a_packed_document_are_those_of_it_alone(attention: str, tiny: Make) -> None:
    module, batch = with_attention(tiny, "Gemma3Text", attention), packed([5, 9, 2])
    alone = Batch(
        input_ids_BT=batch.input_ids_BT[:, 5:14], targets_BT=batch.targets_BT[:, 5:14], trained_N=batch.trained_N
    )
    gradients = []
    for rows, chosen in ((batch, slice(5, 14)), (alone, slice(None))):
        module.zero_grad()
        compute(module, rows, HIDDEN).hidden_BTH[0, chosen].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-4, msg=name)


def test_dropout_is_no_sign_of_a_leak_and_the_trial_moves_no_randomness(tiny: Make) -> None:
    module = tiny("Llama", attention_dropout=0.5).train()
    module.add_module(HEAD, TokenHead(LogitRule()))
    module.set_attn_implementation("eager")
    torch.manual_seed(5)
    compute(module, packed([5, 9, 2]), HIDDEN)
    tried_first = torch.rand(3)
    torch.manual_seed(5)
    compute(module, packed([5, 9, 2]), HIDDEN)
    assert torch.equal(tried_first, torch.rand(3))


def test_each_attention_of_a_model_is_tried_once(tiny: Make) -> None:
    module, runs = with_attention(tiny, "Llama", "eager"), []
    module.model.register_forward_hook(lambda *_: runs.append(module.config._attn_implementation))
    for _ in range(2):
        compute(module, packed([5, 9, 2]), HIDDEN)
    assert runs == ["eager"] * 4
    assert facts_of(module).packing_proven == "eager"
    module.set_attn_implementation("sdpa")
    compute(module, packed([5, 9, 2]), HIDDEN)
    assert runs[4:] == [DOCUMENTS] * 3


@pytest.mark.parametrize(("family", "changes"), [("GptOss", FAMILIES["GptOss"]), ("OPT", {"ffn_dim": 64})])
def test_networks_that_make_no_masks_from_positions_are_given_them(family: str, changes: dict, tiny: Make) -> None:
    module = tiny(family, **changes)
    module.set_attn_implementation("eager")
    module.add_module(HEAD, TokenHead(LogitRule()))
    compute(module, packed([5, 9, 2]), HIDDEN)
    assert facts_of(module).own_masks, "transformers makes them now: this way may be left out for this model"


def unaware(*inputs: object, **options: object) -> object:
    """An attention of a plugin that looks at no borders."""
    return sdpa_attention_forward(*inputs, **{**options, "is_causal": True})


def test_an_attention_that_crosses_documents_is_found_out(tiny: Make) -> None:
    AttentionInterface.register("unaware", unaware)
    module = with_attention(tiny, "Llama", "unaware")
    with pytest.raises(RunError, match=r"see each other in LlamaForCausalLM with attention 'unaware'"):
        compute(module, packed([5, 9, 2]), HIDDEN)


def test_an_attention_of_a_plugin_that_keeps_documents_apart_passes(tiny: Make) -> None:
    AttentionInterface.register("aware", sdpa_attention_forward)
    AttentionMaskInterface.register("aware", sdpa_mask)
    module = with_attention(tiny, "Llama", "aware")
    compute(module, packed([5, 9, 2]), HIDDEN)
    assert facts_of(module).packing_proven == "aware"


class Smear(torch.nn.Module):
    """A token also reads the one before it: a convolution, as nobody's config tells of."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        out_BTH = self.inner(hidden_BTH)
        return out_BTH + 0.1 * out_BTH.roll(1, dims=1)


def test_a_layer_that_mixes_tokens_unseen_is_found_out(tiny: Make) -> None:
    module = with_attention(tiny, "Llama", "sdpa")
    module.model.layers[0].mlp = Smear(module.model.layers[0].mlp)
    with pytest.raises(RunError, match="packed documents see each other"):
        compute(module, packed([5, 9, 2]), HIDDEN)


MIXING = {
    "Mamba": {"state_size": 4, "intermediate_size": 64},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {
        **EXPERTS,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
}


@pytest.mark.parametrize("family", MIXING)
def test_layers_that_carry_a_state_along_the_row_are_refused(family: str, tiny: Make) -> None:
    module = tiny(family, **MIXING[family])
    assert "recurrent" in traits_of(module.config, module)
    with pytest.raises(UserError, match="rows are packed"):
        compute(module, packed([5, 9, 2]), HIDDEN)


def test_chunked_attention_takes_rows_of_one_chunk_and_refuses_longer_ones(tiny: Make) -> None:
    changes = {**EXPERTS, "intermediate_size_mlp": 64, "attention_chunk_size": 16, "interleave_moe_layer_step": 2}
    module = tiny("Llama4Text", **changes, layer_types=["chunked_attention", "full_attention"])
    compute(module, packed([5, 9, 2]), HIDDEN)
    with pytest.raises(UserError, match="attends in chunks of 16 tokens, and packed rows have 17"):
        compute(module, packed([5, 9, 3]), HIDDEN)


def test_positions_must_come_with_borders(tiny: Make) -> None:
    with pytest.raises(RunError, match="position_ids"):
        compute(with_attention(tiny, "Llama", "sdpa"), replace(packed([5, 9]), position_ids_BT=None), HIDDEN)
