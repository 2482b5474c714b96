"""On a GPU: packed documents are computed as alone, by every attention, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

import pytest
import torch
from pegbox.rows import UNTRAINED, Batch
from pegbox_hf.attention import DOCUMENTS
from pegbox_hf.forward import HEAD, compute
from pegbox_hf.head import LogitRule, TokenHead
from transformers import PreTrainedModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DOCUMENT_LENGTHS = (37, 91, 1, 60, 67)
LOGPS = frozenset({"logps"})
ATTENTION = ("eager", "sdpa", "flex_attention")
FAMILIES = ("Llama", "Qwen3")
SHAPE = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}
HALF_FLOOR, FULL_TOLERANCE = 2e-3, 2e-3
Make = Callable[..., PreTrainedModel]
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


@pytest.fixture(autouse=True)
def _checked_and_exact() -> Iterator[None]:
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.set_sync_debug_mode("default")


def network(make: Make, family: str, attention: str, dtype: torch.dtype) -> PreTrainedModel:
    module = make(family, **SHAPE).to("cuda", dtype).train()
    module.add_module(HEAD, TokenHead(LogitRule()))
    module.set_attn_implementation(attention)
    return module


def rows_of(documents: list[torch.Tensor], *, packed: bool) -> Batch:
    """All documents in one row; or, of one document, a plain row."""
    ids_T = torch.cat(documents)
    lengths = [len(document) for document in documents]
    targets_T = ids_T.roll(-1)
    borders = [0, *accumulate(lengths)]
    targets_T[torch.tensor(borders[1:]) - 1] = UNTRAINED
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    batch = Batch(
        input_ids_BT=ids_T[None],
        targets_BT=targets_T[None],
        trained_N=(targets_T != UNTRAINED).nonzero().flatten(),
        position_ids_BT=positions_T[None] if packed else None,
        cu_seqlens_S=torch.tensor(borders, dtype=torch.int32) if packed else None,
        max_seqlen=max(lengths) if packed else None,
    )
    return batch.to(torch.device("cuda"))


def documents(seed: int = 3) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=random) for length in DOCUMENT_LENGTHS]


def result(module: PreTrainedModel, batches: list[Batch]) -> Result:
    """Log-probabilities of all trained tokens, and the gradients of their sum."""
    module.zero_grad()
    logps = [compute(module, batch, LOGPS).logps_N for batch in batches]
    for logps_N in logps:
        (-logps_N.sum()).backward()
    gradients = {name: p.grad.float().clone() for name, p in module.named_parameters() if p.grad is not None}
    return torch.cat(logps).detach().float(), gradients


def error(got: Result, truth: Result) -> float:
    """The largest relative error, over the log-probabilities and over all gradients together."""
    names = truth[1]
    assert got[1].keys() == names.keys()
    difference = torch.stack([(got[1][name] - names[name]).norm() for name in names]).norm()
    whole = torch.stack([names[name].norm() for name in names]).norm()
    return max(float(difference / whole), float((got[0] - truth[0]).norm() / truth[0].norm()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_documents_have_the_loss_and_gradients_they_have_alone(
    family: str, attention: str, dtype: torch.dtype, tiny: Make
) -> None:
    texts = documents()
    alone = [rows_of([text], packed=False) for text in texts if len(text) > 1]
    module = network(tiny, family, attention, dtype)
    got = result(module, [rows_of(texts, packed=True)])
    assert (module.config._attn_implementation == DOCUMENTS) == (attention == "sdpa" and dtype == torch.bfloat16)
    exact = network(tiny, family, "eager", torch.float32)
    exact.load_state_dict(module.state_dict())
    truth = result(exact, alone)
    if dtype == torch.float32:
        assert error(got, truth) < FULL_TOLERANCE
    else:
        plain = result(network(tiny, family, "eager", dtype), alone)
        assert error(got, truth) <= 2 * error(plain, truth) + HALF_FLOOR


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_changing_a_document_changes_no_other_one(family: str, attention: str, dtype: torch.dtype, tiny: Make) -> None:
    module, texts = network(tiny, family, attention, dtype), documents()
    changed = [texts[0], (texts[1] + 1) % 300, *texts[2:]]
    with torch.no_grad():
        one, two = (
            compute(module, rows_of(rows, packed=True), frozenset({"hidden"})).hidden_BTH[0]
            for rows in (texts, changed)
        )
    ends = [0, *accumulate(DOCUMENT_LENGTHS)]
    for place in range(len(texts)):
        same = torch.equal(one[ends[place] : ends[place + 1]], two[ends[place] : ends[place + 1]])
        assert same == (place != 1), place


@pytest.mark.parametrize(
    ("attention", "dtype"),
    [("sdpa", torch.bfloat16), ("sdpa", torch.float32), ("flex_attention", torch.bfloat16)],
    ids=["sdpa-bf16", "sdpa-fp32", "flex-bf16"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_host_waits_for_nothing_in_a_packed_step(
    family: str, attention: str, dtype: torch.dtype, tiny: Make
) -> None:
    module = network(tiny, family, attention, dtype)
    batches = [rows_of(documents(seed), packed=True) for seed in range(3)]
    result(module, batches)
    torch.cuda.set_sync_debug_mode("error")
    for batch in batches:
        (-compute(module, batch, LOGPS).logps_N.sum()).backward()


def test_layers_computed_again_in_the_backward_keep_documents_apart(tiny: Make) -> None:
    module = network(tiny, "Llama", "sdpa", torch.bfloat16)
    kept = result(module, [rows_of(documents(), packed=True)])
    module.gradient_checkpointing_enable({"use_reentrant": False})
    again = result(module, [rows_of(documents(), packed=True)])
    assert torch.equal(kept[0], again[0])
    assert error(again, kept) < HALF_FLOOR


def test_a_network_that_was_packed_still_masks_left_padding(tiny: Make) -> None:
    module = network(tiny, "Llama", "sdpa", torch.bfloat16)
    ids_BT = torch.randint(3, 300, (2, 24), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :9] = 0
    asked = {"input_ids": ids_BT, "attention_mask": mask_BT, "use_cache": False}
    with torch.no_grad():
        before = module(**asked).logits
        compute(module, rows_of(documents(), packed=True), LOGPS)
        assert module.config._attn_implementation == DOCUMENTS
        assert torch.equal(module(**asked).logits, before)
