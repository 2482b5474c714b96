"""Special tokens by name, new tokens, and the embeddings that new tokens need.

A new token is worth nothing untrained: with adapters the embeddings are frozen unless somebody asks for them, and the
run would learn to read a vector that never moves. After adapters are applied the rows of all new tokens, and their
rows of an untied head, must be trained, or the run stops and says which setting trains them.

First embeddings. The mean of all old ones (or draws around it) keeps the probability of old tokens nearly as it was
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"); a text given as `like` begins with
what the model knows of it. A tied head stays tied.

    V  vocabulary    H  hidden size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pegbox import hooks
from pegbox.errors import ConfigError, RunError

from pegbox_hf.config import HfConfig, NewToken

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Generator, Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHOWN = 3


def wanted_tokens(settings: HfConfig) -> list[NewToken]:
    """`hf.new_tokens`, each with its settings."""
    return [NewToken(text=token) if isinstance(token, str) else token for token in settings.new_tokens]


def add_tokens(tokenizer: PreTrainedTokenizerBase, settings: HfConfig) -> None:
    """Add `hf.new_tokens`, then give tokens the parts that `hf.special_tokens` names.

    Raises:
        ConfigError: a new token is known already or twice in the list; a part goes to a token that does not exist.
    """
    from tokenizers import AddedToken

    new, vocabulary = wanted_tokens(settings), tokenizer.get_vocab()
    if (new or settings.special_tokens) and "MistralCommon" in type(tokenizer).__name__:
        raise ConfigError(
            "hf.new_tokens and hf.special_tokens cannot change this tokenizer",
            "It is mistral-common's, whose tokens are fixed.",
            "Remove them, or set hf.tokenizer to one with a tokenizer.json.",
        )
    seen: set[str] = set()
    for token in new:
        if token.text in vocabulary or token.text in seen:
            where = f"its id is {vocabulary[token.text]}" if token.text in vocabulary else "it is in the list twice"
            raise ConfigError(
                f"hf.new_tokens holds {token.text!r}, which is not new: {where}",
                "A token that exists has an embedding that was trained.",
                "Remove it from hf.new_tokens.",
            )
        seen.add(token.text)
    if new:
        made = [AddedToken(token.text, special=token.special, normalized=False) for token in new]
        tokenizer.add_tokens([token for token in made if not token.special])
        tokenizer.add_tokens([token for token in made if token.special], special_tokens=True)
    known = tokenizer.get_vocab()
    for role, text in settings.special_tokens.items():
        if text not in known:
            raise ConfigError(
                f"hf.special_tokens.{role} is {text!r}, which the tokenizer does not have",
                "It would be split into other tokens.",
                f"Correct it, or add to the config: hf: {{new_tokens: [{{text: {text!r}, special: true}}]}}",
            )
        setattr(tokenizer, role, text)


def new_ids(tokenizer: PreTrainedTokenizerBase, settings: HfConfig) -> list[int]:
    """Ids of `hf.new_tokens`, in the list's order."""
    known = tokenizer.get_vocab()
    return [known[token.text] for token in wanted_tokens(settings)]


def set_special_ids(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: HfConfig) -> None:
    """Have the model's configs name the ids of `hf.special_tokens`; an end token is added to those that end answers."""
    generation = getattr(network, "generation_config", None)
    for role in settings.special_tokens:
        if role == "unk_token":
            continue
        token_id = int(tokenizer.convert_tokens_to_ids(settings.special_tokens[role]))
        for config in (network.config, network.config.get_text_config()):
            setattr(config, f"{role}_id", token_id)
        if generation is None:
            continue
        old = generation.eos_token_id if role == "eos_token" else None
        others = [known for known in (old if isinstance(old, list) else [old]) if known not in (None, token_id)]
        setattr(generation, f"{role}_id", [token_id, *others] if others else token_id)


def grow_embeddings(ctx: Context, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every new token an embedding, and a row of the head; the old rows keep their values.

    Raises:
        ConfigError: the embeddings are quantized.
    """
    import torch

    settings = ctx.section(HfConfig)
    ids, old_rows = new_ids(tokenizer, settings), network.get_input_embeddings().weight.shape[0]
    rows = max(old_rows, *(token_id + 1 for token_id in ids))
    rows = -(-rows // settings.embedding_multiple) * settings.embedding_multiple
    meta = network.get_input_embeddings().weight.is_meta
    resize(network, rows)
    if meta:
        return
    known = min(old_rows, *ids)
    generator = torch.Generator().manual_seed(ctx.rng("hf/new_tokens").seed)
    for matrix in _matrices(network):
        _fill(matrix, ids, known, rows, tokenizer, settings, generator)


def resize(network: PreTrainedModel, rows: int) -> None:
    """Give the embeddings, and the head, this many rows; tied ones stay tied.

    Raises:
        ConfigError: the embeddings are quantized.
    """
    import torch

    embeddings = network.get_input_embeddings()
    if rows == embeddings.weight.shape[0]:
        return
    head = network.get_output_embeddings()
    packed = [part for part in (embeddings, head) if part is not None and not part.weight.dtype.is_floating_point]
    if packed:
        raise ConfigError(
            f"{type(packed[0]).__name__} is quantized, and tokens are added",
            "A quantized matrix cannot grow.",
            "Leave the head and the embeddings unquantized.",
        )
    with torch.random.fork_rng():
        network.resize_token_embeddings(rows, mean_resizing=False)


def _matrices(network: PreTrainedModel) -> list[Tensor]:
    """The embeddings, and the head's weight where it is another tensor."""
    inputs, head = network.get_input_embeddings().weight, network.get_output_embeddings()
    return [inputs] if head is None or head.weight is inputs else [inputs, head.weight]


def _fill(
    matrix_VH: Tensor,
    ids: list[int],
    old: int,
    rows: int,
    tokenizer: PreTrainedTokenizerBase,
    settings: HfConfig,
    generator: Generator,
) -> None:
    """Write the first embeddings of new tokens, and the mean into rows that only fill up."""
    import torch

    with torch.no_grad():
        known_VH = matrix_VH[:old].float()
        mean_H = known_VH.mean(0)
        matrix_VH[max(old, max(ids) + 1) : rows] = mean_H.to(matrix_VH.dtype)
        for token_id, token in zip(ids, wanted_tokens(settings), strict=True):
            first_H = mean_H
            if token.like is not None:
                pieces = tokenizer(token.like, add_special_tokens=False)["input_ids"]
                first_H = known_VH[[piece for piece in pieces if piece < old]].mean(0)
            elif settings.new_embeddings == "sampled":
                first_H = _sample(known_VH, mean_H, generator)
            matrix_VH[token_id] = first_H.to(matrix_VH.dtype)


def _sample(known_VH: Tensor, mean_H: Tensor, generator: Generator) -> Tensor:
    """A draw with the covariance of the old rows: a random mix of their distances from the mean."""
    import torch

    mix_V = torch.randn(len(known_VH), generator=generator).to(known_VH.device)
    return mean_H + mix_V @ (known_VH - mean_H) / len(known_VH) ** 0.5


def require_trained(ctx: Context, model: Model) -> None:
    """Raise if the rows of new tokens would stay as they began.

    Raises:
        RunError: with the setting that trains them.
    """
    settings = ctx.section(HfConfig)
    if model.role != "policy" or not settings.new_tokens or model.name != ctx.config.run.model.name:
        return
    ids = new_ids(tokenizer_of(ctx), settings)
    parts = {"embeddings": model.module.get_input_embeddings(), "head": model.module.get_output_embeddings()}
    tied = "tied_head" in model.traits
    names = {id(module): name for name, module in model.module.named_modules()}
    frozen = {
        what: names.get(id(part), what).split(".modules_to_save")[0]
        for what, part in parts.items()
        if part is not None and not (what == "head" and tied) and not _trains(part, ids)
    }
    if not frozen:
        return
    ends = [name.rsplit(".", 1)[-1] for name in frozen.values()]
    adapted = ctx.owned(hooks.apply_adapters)
    raise RunError(
        f"{len(ids)} tokens are new, but their rows of {', '.join(frozen.values())} are not trained",
        "They would keep the values they began with: the model would never learn what the tokens mean.",
        f"Add to the adapter's section: modules_to_save: [{', '.join(ends)}], or have it train these tokens alone."
        if adapted
        else "Remove what freezes the embeddings, or remove hf.new_tokens.",
    )


def _trains(part: Module, ids: list[int]) -> bool:
    """Whether every row in `ids` of an embedding or head is trained: as a whole, by low rank, or token by token."""
    saved = getattr(part, "token_adapter", None)
    wrapped = part if saved is None else saved
    indices = getattr(wrapped, "token_indices", None)
    if indices is not None:
        chosen = {int(index) for rows in indices.values() for index in rows}
        return chosen >= set(ids) and any(parameter.requires_grad for parameter in wrapped.parameters())
    return any(parameter.requires_grad for name, parameter in part.named_parameters() if not name.endswith("bias"))


def tokenizer_of(ctx: Context) -> PreTrainedTokenizerBase:
    """The run's tokenizer; loaded here where a plan asks for the model alone."""
    from pegbox_hf.processor import load_processor

    return ctx.processor.tokenizer if "processor" in vars(ctx) else load_processor(ctx).tokenizer
