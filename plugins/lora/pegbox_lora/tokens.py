"""Training single rows of the embeddings: tokens by text or id, as rows that PEFT keeps with the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox.errors import UserError, did_you_mean

from pegbox_lora.targets import ends_with

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model

    from pegbox_lora.config import LoraConfig


def token_rows(ctx: Context, settings: LoraConfig, model: Model) -> dict[str, list[int]]:
    """Row numbers of the tokens to train, ascending, by the full name of each module whose rows they are.

    Raises:
        UserError: a text is no token of the tokenizer, or an id is beyond the rows of the module.
    """
    if not settings.tokens:
        return {}
    named = dict(model.module.named_modules())
    if settings.token_modules:
        modules = [name for end in settings.token_modules for name in named if name and ends_with(name, end)]
    else:
        modules = [name for name, part in named.items() if part is model.module.get_input_embeddings()]
    # A text without a tokenizer happens when only the plan is made: then the number of rows is all that matters.
    ids = [
        token if isinstance(token, int) else place if _is_meta(model) else _id(ctx, token)
        for place, token in enumerate(settings.tokens)
    ]
    rows = min(named[name].weight.shape[0] for name in modules)
    beyond = [token for token, number in zip(settings.tokens, ids, strict=True) if number >= rows]
    if beyond:
        raise UserError(
            f"lora.tokens holds {beyond[0]!r}, but {modules[0]} of {model.name} has {rows} rows",
            "A row that is not there cannot be trained.",
            "Correct lora.tokens, or enlarge the embeddings first.",
        )
    twice = sorted({number for number in ids if ids.count(number) > 1})
    if twice and not _is_meta(model):
        raise UserError(
            f"lora.tokens names the token {twice[0]} twice, by text and by id",
            "Each row has one update.",
            "Remove one of them.",
        )
    return {name: sorted(ids) for name in modules}


def _is_meta(model: Model) -> bool:
    return next(model.module.parameters()).device.type == "meta"


def _id(ctx: Context, text: str) -> int:
    vocabulary = ctx.processor.tokenizer.get_vocab()
    if text in vocabulary:
        return int(vocabulary[text])
    ids = ctx.processor.tokenizer.encode(text, add_special_tokens=False)
    # A token's text in the vocabulary may be written otherwise: ` the` as `Ġthe`.
    if len(ids) == 1 and ctx.processor.tokenizer.decode(ids) == text:
        return int(ids[0])
    # All of a vocabulary fits into no message, and in a large one something is near anything.
    close = did_you_mean(text, vocabulary) if len(vocabulary) < 1000 else ""
    raise UserError(
        f"lora.tokens holds '{text}', which is {len(ids)} tokens of this tokenizer, or an unknown one",
        close if close.startswith("Did") else "A row belongs to one token.",
        "Write one token as the tokenizer has it, or its id.",
    )
