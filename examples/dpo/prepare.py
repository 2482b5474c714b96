"""Samples a rejected answer to each of 176 requests, and writes data/train.jsonl and data/eval.jsonl.

    python prepare.py             some minutes
    python prepare.py --split     without sampling: the rows that are there are cleaned and split again

A pair is a request, the command that does it (rows of ../quickstart/data) and what the model says before any training.
DATA.md says more. The seed is fixed, but float32 sums differ between processors and versions of torch: elsewhere some
answers may come out differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "quickstart"
REQUESTS = 176
BATCH = 16
LONGEST_ANSWER = 40
EVAL_SHARE = 6
UNFIT = re.compile(r"://|\w@\w|\.ru\b|\brm -|/mnt/|bitch|Baghdadi|Aminabhatzade|Abell", re.IGNORECASE)
"""Invented addresses that may be somebody's; persons; abuse; commands that remove files; mounted folders."""

Message = dict[str, str]
Pair = Mapping[str, Sequence[Message]]


def chosen() -> list[list[Message]]:
    """The first rows of the quickstart, shortest requests first: a request and the command that does it."""
    lines = (QUICKSTART / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:REQUESTS]
    return sorted((json.loads(line)["messages"] for line in lines), key=lambda messages: len(messages[0]["content"]))


def sampled() -> Iterator[Pair]:
    """Pairs of a command and what the untrained model says (temperature 0.8, the likeliest 95 %, 40 tokens)."""
    import torch

    tokenizer, model = opened()
    rows = chosen()
    torch.manual_seed(0)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        for messages, text in zip(part, answers(tokenizer, model, part), strict=True):
            rejected = [{"role": "assistant", "content": text}]
            yield {"prompt": messages[:-1], "chosen": messages[-1:], "rejected": rejected}
        print(f"{min(start + BATCH, len(rows))} of {len(rows)} requests answered", flush=True)


def opened() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The model of the quickstart, converted from GGUF the first time, as plain transformers."""
    from pegbox import hooks
    from pegbox.plan import compose
    from pegbox.types import ModelOptions, ModelRequest

    ctx = compose(QUICKSTART / "config.yaml")
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    request = ModelRequest(
        name=ctx.config.run.model.name,
        format=ctx.config.run.model.format,
        role="reference",
        options=ModelOptions(dtype="float32"),
    )
    tokenizer = ctx.processor.tokenizer
    tokenizer.padding_side = "left"
    return tokenizer, ctx.call(hooks.load_model, ctx, request).module.eval()


def answers(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, rows: Sequence[Sequence[Message]]
) -> Iterator[str]:
    """One sampled answer to each request."""
    import torch

    asked = [tokenizer.apply_chat_template(row[:-1], tokenize=False, add_generation_prompt=True) for row in rows]
    encoded = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}
    with torch.no_grad():
        told = model.generate(**encoded, **sampling, max_new_tokens=LONGEST_ANSWER, pad_token_id=tokenizer.pad_token_id)
    for ids in told[:, encoded["input_ids"].shape[1] :]:
        yield tokenizer.decode(ids, skip_special_tokens=True).strip()


def is_fit(pair: Pair) -> bool:
    """Whether there is something to prefer, and nothing in the rejected answer that data should not hold."""
    command, text = pair["chosen"][0]["content"], pair["rejected"][0]["content"]
    return bool(text) and text != command and not UNFIT.search(text)


def is_held_out(request: str) -> bool:
    """Whether a request is for evaluation: decided by its text alone, so that both its commands are."""
    return int.from_bytes(hashlib.sha256(request.encode()).digest()[:8], "big") % EVAL_SHARE == 0


def build(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """The lines of both files."""
    lines: dict[str, list[str]] = {"train": [], "eval": []}
    for pair in filter(is_fit, pairs):
        split = "eval" if is_held_out(pair["prompt"][-1]["content"]) else "train"
        lines[split].append(json.dumps(pair, ensure_ascii=False) + "\n")
    return lines


def kept() -> list[Pair]:
    """The pairs of both files as they are."""
    files = [HERE / "data" / f"{name}.jsonl" for name in ("train", "eval")]
    return [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Write both files, and say how many rows each has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", action="store_true", help="do not sample: clean and split the rows that are there")
    (HERE / "data").mkdir(exist_ok=True)
    for name, lines in build(kept() if parser.parse_args().split else sampled()).items():
        (HERE / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"data/{name}.jsonl: {len(lines)} rows")


if __name__ == "__main__":
    main()
