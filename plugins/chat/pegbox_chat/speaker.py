"""A model that answers: loaded through the hooks, prompted with its chat template, streamed as it writes.

Generation ends at the end tokens of the generation config and of the tokenizer, and at the token that the chat
template puts after an answer: a model that was fine-tuned on a template ends its turn with that one, whatever its
config says. A tokenizer without a template gives plain completion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

from pegbox.errors import UserError

from pegbox_chat.dialogue import note
from pegbox_chat.opened import open_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Write = Callable[[str], None]
MARK = "pegbox"


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How answers are chosen; temperature 0 takes the likeliest token each time."""

    max_tokens: int
    temperature: float
    top_p: float

    def arguments(self) -> dict[str, object]:
        """What `generate` takes."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_tokens, "do_sample": False}
        chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_tokens, **chosen}


@dataclass(frozen=True)
class Speaker:
    """A loaded model and its tokenizer."""

    module: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad_id: int
    sampling: Sampling

    def answer(self, messages: list[Message], write: Write) -> str:
        """Write the answer to a conversation piece by piece; what was written before Ctrl-C counts.

        Raises:
            UserError: the conversation does not fit the model, or its template does not take it.
        """
        import torch

        ids_BT = self._encode(messages)
        length = ids_BT.shape[1]
        self._require_room(length)
        written: list[str] = []

        def take(text: str) -> None:
            written.append(text)
            write(text)

        with torch.inference_mode():
            try:
                self.module.generate(
                    input_ids=ids_BT,
                    attention_mask=torch.ones_like(ids_BT),
                    streamer=_streamer(self.tokenizer, take),
                    eos_token_id=end_ids(self.module, self.tokenizer),
                    pad_token_id=self.pad_id,
                    **self.sampling.arguments(),
                )
            except KeyboardInterrupt:
                note(" [stopped]")
        return "".join(written).strip()

    def _encode(self, messages: list[Message]) -> Tensor:
        import jinja2

        if self.tokenizer.chat_template is None:
            text = "\n".join(message["content"] for message in messages)
            encoded = self.tokenizer(text, return_tensors="pt")
        else:
            try:
                encoded = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except jinja2.TemplateError as error:
                raise UserError(
                    f"the model's chat template does not take this conversation: {error}",
                    "Templates may refuse roles or an order of roles.",
                    "Begin without a system message, or anew with /reset.",
                ) from error
        return encoded["input_ids"].to(self.module.device)

    def _require_room(self, length: int) -> None:
        limit = getattr(self.module.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length >= limit:
            raise UserError(
                f"the conversation has {length} tokens, and the model reads {limit}",
                "Nothing would be left for the answer.",
                "Begin anew with /reset, or ask something shorter.",
            )


def open_speaker(name: str, sampling: Sampling, seed: int | None) -> Speaker:
    """Load a run or a model for a conversation.

    Raises:
        UserError: there is no such model, or the run was not exported.
    """
    model = open_model(name)
    import torch

    if model.tokenizer.chat_template is None:
        note("The tokenizer has no chat template: the model goes on with what you type.")
    if seed is not None:
        torch.manual_seed(seed)
    return Speaker(model.module, model.tokenizer, model.pad_id, sampling)


def end_ids(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer."""
    configured = module.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    found = [*known, tokenizer.eos_token_id, turn_end(tokenizer)]
    return sorted({int(token) for token in found if token is not None})


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the chat template puts after an answer, None if it puts none."""
    import jinja2

    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.TemplateError:
        return None
    after = text.rpartition(MARK)[2].lstrip()
    added = {str(token): token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    found = max((token for token in added if after.startswith(token)), key=len, default=None)
    return None if found is None else added[found]


def _streamer(tokenizer: PreTrainedTokenizerBase, write: Write) -> object:
    from transformers import TextStreamer

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                write(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
