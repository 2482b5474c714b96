"""What a reward model reads: the prompt and the completion, in its own tokens.

| what is known of the prompt | what is read |
|---|---|
| messages, in a column, and the model has a chat template | the conversation with the answer as its last turn |
| token ids, and both tokenizers have one vocabulary | these very tokens, and what the template puts behind a turn |
| token ids, and the model has a tokenizer of its own | their text without special tokens, and its end token |

The first is what such models are trained on. An answer that was cut off is no whole turn: its text stands at the end
with nothing behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pegbox.errors import ConfigError, RunError

if TYPE_CHECKING:
    from pegbox.rollouts import Rollout
    from transformers import PreTrainedTokenizerBase

PROBE = "text"
"""What stands for a question and its answer where a template is tried."""


@dataclass(frozen=True)
class Renderer:
    """Tokens of a reward model for completions.

    Attributes:
        tokenizer: the reward model's.
        own: the tokenizer of the completions.
        column: which column of a prompt's row may hold messages.
    """

    tokenizer: PreTrainedTokenizerBase
    own: PreTrainedTokenizerBase
    column: str

    def answer(self, rollout: Rollout) -> list[int]:
        """Token ids of prompt and completion."""
        messages, text = self._messages(rollout), self._text(rollout.completion)
        if messages is not None:
            return self._conversation(messages, text, finished=rollout.finished)
        if same_vocabulary(self.tokenizer, self.own):
            return [*rollout.prompt, *rollout.completion, *self._rest_of_turn(rollout)]
        end = self.tokenizer.eos_token_id
        ids = [int(token) for token in self.tokenizer(self._text(rollout.prompt) + text)["input_ids"]]
        return ids if end is None or not rollout.finished or ids[-1:] == [end] else [*ids, end]

    def steps(self, rollout: Rollout, separator: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt and steps, and the places of the separators behind the steps.

        Pieces are tokenized apart, as in the data format `steps`, so that each separator is a token of its own. Empty
        steps are left out, and the last one has a separator whether or not the answer was cut off.
        """
        messages, ids = self._messages(rollout), []
        if messages is not None:
            ids = self._pieces(self._rendered(messages, add_generation_prompt=True))
        else:
            bos = self.tokenizer.bos_token_id
            ids = [*([] if bos is None else [bos]), *self._pieces(self._text(rollout.prompt))]
        between, places = self.separator(separator), []
        for step in self._text(rollout.completion).split(separator):
            if step.strip():
                ids += [*self._pieces(step), between]
                places.append(len(ids) - 1)
        return ids, places

    def separator(self, text: str) -> int:
        """The id of the separator.

        Raises:
            ConfigError: it is not one token.
        """
        ids = self._pieces(text)
        if len(ids) != 1:
            raise ConfigError(
                f"reward-model: step_separator {text!r} makes {len(ids)} tokens with the reward model's tokenizer",
                "A verdict is given at one token.",
                "Set step_separator to what the model was trained with.",
            )
        return ids[0]

    def _conversation(self, messages: Sequence[Mapping[str, Any]], text: str, *, finished: bool) -> list[int]:
        if not finished:
            return self._pieces(self._rendered(messages, add_generation_prompt=True) + text)
        return self._pieces(self._rendered([*messages, {"role": "assistant", "content": text}]))

    def _rest_of_turn(self, rollout: Rollout) -> list[int]:
        """What the chat template puts behind an answer and the answer's own end lacks, such as a line break.

        Models that learnt from conversations give their reward there. Nothing, if the answer was cut off, or the prompt
        does not end as the template has answers begin.
        """
        opening, closing = self._turn
        if not rollout.finished or not opening or list(rollout.prompt[-len(opening) :]) != opening:
            return []
        said = list(rollout.completion)
        there = [size for size in range(len(closing) + 1) if said[len(said) - size :] == closing[:size]]
        return closing[max(there) :]

    @cached_property
    def _turn(self) -> tuple[list[int], list[int]]:
        """The tokens that stand before and behind an answer; none where the template has no such places."""
        if not getattr(self.tokenizer, "chat_template", None):
            return [], []
        asked = [{"role": "user", "content": PROBE}]
        try:
            before, begun = self._rendered(asked), self._rendered(asked, add_generation_prompt=True)
            whole = self._rendered([*asked, {"role": "assistant", "content": PROBE}])
        except RunError:
            return [], []
        if not begun.startswith(before) or not whole.startswith(begun + PROBE):
            return [], []
        return self._pieces(begun[len(before) :]), self._pieces(whole[len(begun + PROBE) :])

    def _rendered(self, messages: Sequence[Mapping[str, Any]], **options: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
        except (TemplateError, ValueError) as error:
            raise RunError(
                f"the chat template of the reward model {self.tokenizer.name_or_path} refuses a conversation: {error}",
                f"Its turns are {', '.join(str(message.get('role')) for message in messages)}.",
                "Set reward-model.prompt to another column, or use a model whose template takes such turns.",
            ) from error
        return text

    def _messages(self, rollout: Rollout) -> list[Mapping[str, Any]] | None:
        """The messages of the prompt, without answers at their end; None without messages or a template for them."""
        value = rollout.columns.get(self.column)
        if not isinstance(value, list | tuple) or not value or not getattr(self.tokenizer, "chat_template", None):
            return None
        if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in value):
            return None
        messages: list[Mapping[str, Any]] = [*value]  # type: ignore[list-item]  # checked above
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        return messages or None

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.own.decode(list(ids), skip_special_tokens=True)
        return text

    def _pieces(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]]


def same_vocabulary(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of two tokenizers mean the same."""
    if not hasattr(one, "get_vocab") or not hasattr(other, "get_vocab"):
        return False
    return bool(one.get_vocab() == other.get_vocab())
