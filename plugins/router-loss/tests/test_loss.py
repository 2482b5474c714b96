"""The load-balancing loss against transformers' own, and what splits change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from pegbox import hooks
from pegbox.errors import ConfigError, PluginError
from pegbox.hooks import hookimpl
from pegbox.plan import compose
from pegbox.rows import Batch, Example
from pegbox.run import execute
from pegbox.types import Loss, LossOutput, Model, Outputs, Term
from pegbox_router_loss.loss import balance_total
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
FAMILIES = {"Mixtral": {"num_local_experts": 6}, "Qwen3Moe": {"num_experts": 6}, "GptOss": {"num_local_experts": 6}}


class Plain:
    """A loss plugin: the sum of squares of the trained positions' logits."""

    name = "plain"
    needs = frozenset({"logits"})
    scope = "token"

    @hookimpl
    def build_loss(self) -> Loss:
        return self

    def counts(self, batch: Batch) -> dict[str, float]:
        return {self.name: float(batch.trained_tokens)}

    def __call__(self, batch: Batch, outputs: Outputs) -> LossOutput:
        total = outputs.logits_NV.square().sum()
        return LossOutput(terms=(Term(name=self.name, total=total, count=float(batch.trained_tokens)),))


def network(family: str = "Mixtral", **changes: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or "gate.weight" in name:
                parameter.normal_()
    return model


def rows(count: int = 4, tokens: int = 7, padded: bool = True) -> Batch:
    random = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(0, 100, (count, tokens), generator=random)
    lengths = torch.randint(3, tokens + 1, (count, 1), generator=random) if padded else torch.full((count, 1), tokens)
    mask_BT = (torch.arange(tokens) < lengths).long()
    targets_BT = torch.where((mask_BT == 1) & (torch.rand(count, tokens, generator=random) < 0.6), ids_BT, -100)
    trained_N = (targets_BT.flatten() != -100).nonzero().flatten()
    return Batch(input_ids_BT=ids_BT, targets_BT=targets_BT, trained_N=trained_N, attention_mask_BT=mask_BT)


def part(batch: Batch, chosen: slice) -> Batch:
    targets_BT = batch.targets_BT[chosen]
    return Batch(
        input_ids_BT=batch.input_ids_BT[chosen],
        targets_BT=targets_BT,
        trained_N=(targets_BT.flatten() != -100).nonzero().flatten(),
        attention_mask_BT=batch.attention_mask_BT[chosen],
    )


def routed(model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, ...]:
    mask = batch.attention_mask_BT
    return model(input_ids=batch.input_ids_BT, attention_mask=mask, output_router_logits=True).router_logits


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_micro_batch_gives_what_transformers_gives(family: str, padded: bool) -> None:
    model, batch = network(family), rows(padded=padded)
    total = balance_total(routed(model, batch), batch, 2, "micro_batch")
    theirs = load_balancing_loss_func(routed(model, batch), 6, 2, batch.attention_mask_BT)
    torch.testing.assert_close(total / batch.trained_tokens, theirs)
    (total / batch.trained_tokens).backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    theirs.backward()
    assert any("gate" in name or "router" in name for name in ours)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_models_own_loss_grows_by_the_same_amount() -> None:
    model, batch = network(router_aux_loss_coef=0.02), rows()
    labels = batch.input_ids_BT.masked_fill(batch.attention_mask_BT == 0, -100)
    inputs = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT, "labels": labels}
    grown = model(**inputs, output_router_logits=True).loss - model(**inputs).loss
    ours = 0.02 * balance_total(routed(model, batch), batch, 2, "micro_batch") / batch.trained_tokens
    torch.testing.assert_close(ours, grown, rtol=1e-4, atol=1e-5)


def test_over_documents_each_row_is_a_set_of_its_own() -> None:
    model, batch = network(), rows()
    expected = torch.zeros(())
    for row in range(4):
        alone = part(batch, slice(row, row + 1))
        expected = expected + alone.trained_tokens * load_balancing_loss_func(
            routed(model, alone), 6, 2, alone.attention_mask_BT
        )
    torch.testing.assert_close(balance_total(routed(model, batch), batch, 2, "document"), expected)


@pytest.mark.parametrize("split", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)])
def test_over_documents_no_split_changes_the_value(split: tuple[int, ...]) -> None:
    model, batch, start, total = network(), rows(), 0, torch.zeros(())
    for size in split:
        piece = part(batch, slice(start, start + size))
        total, start = total + balance_total(routed(model, piece), piece, 2, "document"), start + size
    torch.testing.assert_close(total, balance_total(routed(model, batch), batch, 2, "document"))


def test_over_documents_packing_changes_nothing() -> None:
    model, batch = network(), rows()
    logits = routed(model, batch)
    lengths = batch.attention_mask_BT.sum(1).tolist()
    real = batch.attention_mask_BT.flatten() == 1
    targets = batch.targets_BT.flatten()[real]
    padding = 3  # the end of a packed row: a document of its own without trained tokens
    packed = Batch(
        input_ids_BT=torch.cat([batch.input_ids_BT.flatten()[real], torch.zeros(padding, dtype=torch.long)])[None],
        targets_BT=torch.cat([targets, torch.full((padding,), -100)])[None],
        trained_N=(targets != -100).nonzero().flatten(),
        cu_seqlens_S=torch.tensor([0, *lengths, padding]).cumsum(0).to(torch.int32),
    )
    moved = tuple(torch.cat([layer[real], torch.randn(padding, 6)]) for layer in logits)
    torch.testing.assert_close(balance_total(moved, packed, 2, "document"), balance_total(logits, batch, 2, "document"))


def test_balance_gives_the_number_of_chosen_experts_and_imbalance_more() -> None:
    batch = rows(1, 6, padded=False)
    even = 50.0 * torch.eye(6)[None].expand(1, 6, 6).reshape(6, 6) + 50.0 * torch.eye(6).roll(1, 1)
    one_sided = torch.tensor([[9.0, 8.0, 0.0, 0.0, 0.0, 0.0]]).expand(6, 6)
    for over in ("micro_batch", "document"):
        value = balance_total((even,), batch, 2, over) / batch.trained_tokens
        torch.testing.assert_close(value, torch.tensor(2.0))
        assert balance_total((one_sided,), batch, 2, over) / batch.trained_tokens > 5


def test_no_trained_token_gives_zero_that_still_has_a_gradient() -> None:
    model, batch = network(), rows()
    empty = replace(batch, targets_BT=batch.targets_BT * 0 - 100, trained_N=batch.trained_N[:0])
    for over in ("micro_batch", "document"):
        total = balance_total(routed(model, empty), empty, 2, over)
        total.backward()
        assert float(total) == 0.0


def build(model: PreTrainedModel, traits: set[str], plain: object | None = None, **settings: Any) -> Loss:
    config = {"model": {"name": "tiny"}, "plugins": ["plain", "router-loss"], "router-loss": settings}
    ctx = compose(config, instances={"plain": plain or Plain()})
    wrapped = Model(
        module=model, name="tiny", base="tiny", format="x", compute=lambda *_: Outputs(), traits=frozenset(traits)
    )
    return ctx.call(hooks.build_loss, ctx, wrapped)


def test_the_term_stands_beside_the_other_loss_with_its_weight() -> None:
    model, batch = network(router_aux_loss_coef=0.02), rows()
    logits_NV = model(input_ids=batch.input_ids_BT).logits.flatten(0, 1)[batch.trained_N]
    outputs = Outputs(logits_NV=logits_NV, router_logits=routed(model, batch))
    for settings, weight in (({}, 0.02), ({"coefficient": 0.5}, 0.5)):
        loss = build(model, {"moe"}, **settings)
        assert loss.needs == {"logits", "router_logits"}
        terms = {term.name: term for term in loss(batch, outputs).terms}
        assert {name: term.count for name, term in terms.items()} == loss.counts(batch)
        assert terms["plain"].weight == 1.0
        assert terms["router"].weight == weight


class Rows:
    """Brings eight rows, as a data plugin does."""

    split, fingerprint = "train", "eight"

    @hookimpl
    def build_dataset(self, split: str) -> Any:
        return self if split == "train" else None

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Example:
        ids = [(7 * index + 3 * place) % 90 + 3 for place in range(5 + index % 4)]
        return Example(input_ids=ids, labels=ids)

    def describe(self, index: int) -> str:
        return f"row {index}"


def test_a_run_shows_the_term_and_balances_the_experts(tmp_path: Path) -> None:
    network().save_pretrained(tmp_path / "moe")
    words = {"<end>": 0, "word": 1}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="word")), eos_token="<end>"
    ).save_pretrained(tmp_path / "moe")
    config = {
        "model": {"name": str(tmp_path / "moe")},
        "plugins": ["hf", "rows", "sft", "router-loss", "adamw", "trainer"],
        "router-loss": {"coefficient": 3.0, "over": "document"},
        "adamw": {"learning_rate": 1e-2},
        "trainer": {"max_steps": 8, "micro_batch": 4, "log_every": 1, "save_every": None, "progress": "none"},
        "output": str(tmp_path / "run"),
    }
    execute(compose(config, instances={"rows": Rows()}))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = [value for line in lines for key, value in line.items() if "router" in key]
    assert len(shown) >= 8
    assert shown[-1] < shown[0]


def test_what_has_no_routers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no experts"):
        build(network(), {"causal"})
    model = network()
    model.config.router_aux_loss_coef = 0.0
    with pytest.raises(ConfigError, match=r"router-loss\.coefficient is not set"):
        build(model, {"moe"})


def test_the_state_of_the_other_loss_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain: Any = Plain()
    plain.state_dict, kept = (lambda: {"seen": 3}), SimpleNamespace()
    plain.load_state_dict = lambda state: setattr(kept, "state", state)
    loss: Any = build(network(), {"moe"}, plain)
    loss.load_state_dict(loss.state_dict())
    assert kept.state == {"seen": 3}
    assert not hasattr(build(network(), {"moe"}), "state_dict")


def test_a_term_of_the_same_name_is_refused() -> None:
    plain = Plain()
    plain.name = "router"
    with pytest.raises(PluginError, match="a term 'router' of its own"):
        build(network(), {"moe"}, plain).counts(rows())
