"""Small real things: a Llama of two layers, a network of plain torch, batches for them, a tokenizer of bytes, rollouts.

The Llama is transformers' own, made from a config with seeded random weights; nothing is downloaded. torch and
transformers are imported when they are asked for, and a test that asks for them is skipped where they are missing.
Shape suffixes as in `pegbox.types`: B rows, T tokens of a row, N trained tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pegbox.record import Json
from pegbox.rollouts import Rollout, RolloutBatch
from pegbox.rows import UNTRAINED, Batch, Example, Split
from pegbox.testing.libraries import torch, transformers
from pegbox.types import Model, Need, Outputs, Processor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module
    from torch.optim import Optimizer

VOCABULARY = 260
"""256 bytes, and four more ids for special tokens."""
PAD, BOS, EOS = 256, 257, 258
WIDTH = 64
LENGTHS = ((9, 3), (6, 2), (11, 8), (5, 1), (8, 0), (7, 4))
"""Tokens of each row of `tiny_batches`, and how many of them at the start are not trained."""


def tiny_model(seed: int = 0, *, placed: bool = False, **changes: Any) -> Model:
    """A Llama of 2 layers, 64 wide, in float32 on the CPU, ready to be patched, adapted and trained.

    Args:
        seed: of the random weights.
        placed: give it a placement and a forward, as `place_model` would.
        changes: fields of transformers' LlamaConfig that differ, such as `tie_word_embeddings=True`.
    """
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = transformers().LlamaConfig(
        **{**shape, **heads, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, **changes}
    )
    with torch().random.fork_rng(devices=[]):
        torch().manual_seed(seed)
        module = transformers().LlamaForCausalLM(config).train()
    traits = frozenset({"causal", "tied_head"} if config.tie_word_embeddings else {"causal"})
    model = Model(module=module, name="tiny", base="tiny", format="transformers", compute=compute, traits=traits)
    return _placed(model) if placed else model


def plain_model(seed: int = 0, *, placed: bool = False) -> Model:
    """A causal network of plain torch, for tests that need no transformers: each token sees the mean of those so far.

    Args:
        seed: of the random weights.
        placed: give it a placement and a forward, as `place_model` would.
    """
    nn = torch().nn
    with torch().random.fork_rng(devices=[]):
        torch().manual_seed(seed)
        parts = {"embed": nn.Embedding(VOCABULARY, 16), "mix": nn.Linear(16, 16), "head": nn.Linear(16, VOCABULARY)}
    model = Model(
        module=nn.ModuleDict(parts),
        name="plain",
        base="plain",
        format="plain",
        compute=compute_plain,
        traits=frozenset({"causal"}),
    )
    return _placed(model) if placed else model


def _placed(model: Model) -> Model:
    def forward(batch: Batch, needs: frozenset[Need]) -> Outputs:
        return model.compute(model.module, batch, needs)

    return replace(model, placement=TinyPlacement(model.module), forward=forward)


def compute(module: Module, batch: Batch, needs: frozenset[Need]) -> Outputs:
    """One plain forward of a causal language model of transformers, and what was asked for of it."""
    out = module(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=batch.position_ids_BT,
        output_hidden_states=bool(needs & {"hidden", "values"}),
        use_cache=False,
    )
    return _asked_for(out.hidden_states[-1] if out.hidden_states else None, out.logits, batch, needs)


def compute_plain(module: Any, batch: Batch, needs: frozenset[Need]) -> Outputs:
    """One forward of `plain_model`, and what was asked for of it."""
    embedded_BTH = module["embed"](batch.input_ids_BT)
    lengths_T1 = torch().arange(1, embedded_BTH.shape[1] + 1)[:, None]
    hidden_BTH = module["mix"](embedded_BTH.cumsum(1) / lengths_T1).tanh()
    return _asked_for(hidden_BTH, module["head"](hidden_BTH), batch, needs)


def _asked_for(hidden_BTH: Tensor | None, logits_BTV: Tensor, batch: Batch, needs: frozenset[Need]) -> Outputs:
    """The outputs that a loss needs. `values` are the mean of the last hidden state, in place of a value head."""
    if "router_logits" in needs:
        raise ValueError("this model is dense, it has no router: override the conformance class's model")
    logits_NV = logits_BTV.flatten(0, 1)[batch.trained_N].float()
    logps_NV = logits_NV.log_softmax(-1)
    targets_N = batch.targets_BT.flatten()[batch.trained_N]
    return Outputs(
        logps_N=logps_NV.gather(-1, targets_N[:, None])[:, 0] if "logps" in needs else None,
        entropy_N=-(logps_NV.exp() * logps_NV).sum(-1) if "entropy" in needs else None,
        logits_NV=logits_NV if "logits" in needs else None,
        hidden_BTH=hidden_BTH if "hidden" in needs else None,
        values_BTC=hidden_BTH.float().mean(-1, keepdim=True) if hidden_BTH is not None and "values" in needs else None,
    )


class TinyPlacement:
    """A model where it is (`pegbox.types.Placement`): one device, saved with `torch.save`."""

    name = "where it was made"

    def __init__(self, module: Module) -> None:
        self._module = module

    def synchronize_gradients(self, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def clip_gradients(self, max_norm: float | None) -> Tensor:
        limit = float("inf") if max_norm is None else max_norm
        return cast("Tensor", torch().nn.utils.clip_grad_norm_(self._module.parameters(), limit))

    def save(self, folder: Path, optimizer: Optimizer) -> None:
        state = {"model": self._module.state_dict(), "optimizer": optimizer.state_dict()}
        torch().save(state, folder / "placement.pt")

    def load(self, folder: Path, optimizer: Optimizer) -> None:
        state = torch().load(folder / "placement.pt", weights_only=True)
        self._module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


def tiny_batches(rows: int = 3, seed: int = 0) -> list[Batch]:
    """Two micro-batches of random tokens, `rows` rows each of different length, some of whose tokens are trained."""
    source = torch().Generator().manual_seed(seed)
    made = []
    for start in (0, rows):
        shapes = [LENGTHS[index % len(LENGTHS)] for index in range(start, start + rows)]
        examples = []
        for length, prompt in shapes:
            ids = torch().randint(0, 256, (length,), generator=source).tolist()
            examples.append(Example(input_ids=ids, labels=[UNTRAINED] * prompt + ids[prompt:]))
        made.append(collate(examples, tuple(range(start, start + rows))))
    return made


def collate(examples: Sequence[Example], rows: tuple[int, ...] = ()) -> Batch:
    """Examples of one document each as one padded batch; their signs are those of the documents."""
    width = max(len(example.input_ids) for example in examples)
    input_ids_BT = torch().full((len(examples), width), PAD)
    targets_BT = torch().full_like(input_ids_BT, UNTRAINED)
    mask_BT = torch().zeros_like(input_ids_BT)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids_BT[row, :length] = torch().tensor(example.input_ids)
        targets_BT[row, : length - 1] = torch().tensor(example.labels)[1:]
        mask_BT[row, :length] = 1
    trained_N = (targets_BT.flatten() != UNTRAINED).nonzero()[:, 0]
    signs = [sign for example in examples for sign in example.signs]
    return Batch(
        input_ids_BT=input_ids_BT,
        targets_BT=targets_BT,
        trained_N=trained_N,
        attention_mask_BT=mask_BT,
        document_N=trained_N // width,
        last_D=torch().arange(len(examples)) * width + mask_BT.sum(1) - 1,
        sign_D=torch().tensor(signs, dtype=torch().int8) if signs else None,
        rows=rows,
    )


class TinyExamples:
    """Rows given as texts (`pegbox.rows.Examples`), one token per byte; every token is trained."""

    def __init__(self, texts: Sequence[str], split: Split = "train") -> None:
        self.split: Split = split
        self.fingerprint = blake2b("\0".join(texts).encode(), digest_size=8).hexdigest()
        self._texts = tuple(texts)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> Example:
        ids = [*self._texts[index].encode(), EOS]
        return Example(input_ids=ids, labels=ids, columns={"text": self._texts[index]})

    def describe(self, index: int) -> str:
        return f"text {index}"


class ByteTokenizer:
    """One token per byte of UTF-8, in plain Python: the part of a tokenizer's interface that rewards use."""

    pad_token_id, bos_token_id, eos_token_id = PAD, BOS, EOS
    pad_token, bos_token, eos_token = "<pad>", "<bos>", "<eos>"
    all_special_ids = (PAD, BOS, EOS)

    def __len__(self) -> int:
        return VOCABULARY

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> dict[str, list[int]]:
        ids = self.encode(text, add_special_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
        return [BOS, *text.encode()] if add_special_tokens else list(text.encode())

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: object) -> str:
        names = {} if skip_special_tokens else {PAD: self.pad_token, BOS: self.bos_token, EOS: self.eos_token}
        pieces = (bytes([token]) if token < PAD else names.get(token, "").encode() for token in map(int, ids))
        return b"".join(pieces).decode(errors="replace")

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return [self.decode(row, **options) for row in rows]


def tiny_processor() -> Processor:
    """A processor whose tokenizer is a `ByteTokenizer`."""
    return Processor(tokenizer=cast("Any", ByteTokenizer()), pad_id=PAD, fingerprint="bytes")


def tiny_rollouts(samples: int = 2) -> RolloutBatch:
    """Completions of three sums: right, wrong, empty, cut off; the column `answer` holds the right one."""
    texts = {"1+1=": ("2", ["2", "3, I think"]), "2+3=": ("5", ["", "it is 5"]), "4+5=": ("9", ["9" * 12, "nine"])}
    rollouts = []
    for prompt, (answer, completions) in texts.items():
        for index in range(samples):
            text = completions[index % len(completions)]
            columns: Mapping[str, Json] = {"prompt": prompt, "answer": answer}
            ids = tuple(text.encode())
            rollouts.append(
                Rollout(
                    prompt=(BOS, *prompt.encode()),
                    completion=ids if len(ids) == 12 else (*ids, EOS),
                    logps=(-0.5,) * (len(ids) + (len(ids) != 12)),
                    first_version=0,
                    last_version=0,
                    finished=len(ids) != 12,
                    columns=columns,
                )
            )
    return RolloutBatch(rollouts=tuple(rollouts), samples=samples)
