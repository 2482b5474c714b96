"""The head: from hidden states of trained positions to log-probabilities of their targets.

The trunk runs over all tokens, the head only over the N trained ones: with a vocabulary of 128k the logits of untrained
tokens would be most of the memory of a step. What a model does to its logits after the projection (Gemma's
soft cap, Cohere's and Granite's scale) is found by trying the model's own head on made-up hidden states once, at
loading; a head that does something else is refused, because every log-probability would be wrong.

The seam: `TokenHead` is a child of the model, named `token_head`. A patch of slot `head` targets that name and gives
a callable with the arguments of `TokenHead.forward`; `TokenHead.rule` tells it what happens to the logits.

    N  trained tokens    H  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from pegbox.errors import UserError
from pegbox.types import Need, Outputs
from torch import Tensor, nn

from pegbox_hf.forward import trunk

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
PROBE_TOKENS = 4
META_VOCABULARY = 64
PROBE_SPREAD = 20.0
"""Standard deviation of the made-up logits: large enough for a soft cap to show."""


@dataclass(frozen=True)
class LogitRule:
    """What happens to logits after the projection: `softcap * tanh(scale * logits / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits_NV: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        return logits_NV if self.softcap is None else self.softcap * torch.tanh(logits_NV / self.softcap)


class TokenHead(nn.Module):
    """Plain torch; memory is two times N x V floats, and once more in backward."""

    def __init__(self, rule: LogitRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, hidden_NH: Tensor, projection: nn.Module, targets_N: Tensor, needs: frozenset[Need]) -> Outputs:
        """Log-probabilities and what else `needs` names.

        Args:
            hidden_NH: the trunk's last hidden states at the trained positions.
            projection: the model's output embeddings, adapters included; usually an `nn.Linear`.
            targets_N: token ids.
            needs: some of `logps`, `entropy`, `logits`.
        """
        logits_NV = self.rule(projection(hidden_NH).float())
        normalizer_N = torch.logsumexp(logits_NV, dim=-1) if needs & {"logps", "entropy"} else None
        return Outputs(
            logits_NV=logits_NV if "logits" in needs else None,
            logps_N=_picked(logits_NV, targets_N) - normalizer_N if "logps" in needs else None,
            entropy_N=_entropy(logits_NV, normalizer_N) if "entropy" in needs else None,
        )

    def extra_repr(self) -> str:
        return f"scale={self.rule.scale}, softcap={self.rule.softcap}"


def _picked(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return logits_NV.gather(-1, targets_N.unsqueeze(-1)).squeeze(-1)


def _entropy(logits_NV: Tensor, normalizer_N: Tensor | None) -> Tensor:
    assert normalizer_N is not None
    return normalizer_N - ((logits_NV - normalizer_N.unsqueeze(-1)).exp() * logits_NV).sum(-1)


def find_rule(module: PreTrainedModel) -> LogitRule:
    """What the model does to its logits, found by comparing with its own head.

    Raises:
        UserError: it does something that is not known here.
    """
    projection = module.get_output_embeddings()
    with _some_weights(projection):
        hidden_NH = made_up_hidden(projection)
        with torch.no_grad():
            own_NV = own_logits(module, hidden_NH).float()
            plain_NV = projection(hidden_NH).float()
    slack = 1e-4 if hidden_NH.dtype == torch.float32 else 2e-2
    for rule in _rules(module.config.get_text_config()):
        if torch.allclose(rule(plain_NV), own_NV, rtol=slack, atol=slack * float(own_NV.abs().max())):
            return rule
    raise UserError(
        f"{type(module).__name__} does something to its logits that is not known here",
        "Its own head and the projection alone give different logits for the same hidden states.",
        "Use another model, or a plugin that loads this one.",
    )


@contextmanager
def _some_weights(projection: nn.Module) -> Iterator[None]:
    """Within it a projection without weights (on the meta device) has made-up ones, of a few tokens only."""
    own = dict(projection.named_parameters(recurse=False))
    if not any(weight.is_meta for weight in own.values()):
        yield
        return
    generator = torch.Generator().manual_seed(0)
    for name, weight in own.items():
        made = torch.randn(META_VOCABULARY, *weight.shape[1:], generator=generator)
        setattr(projection, name, nn.Parameter(made.to(weight.dtype), requires_grad=False))
    try:
        yield
    finally:
        for name, weight in own.items():
            setattr(projection, name, weight)


def _rules(config: PretrainedConfig) -> Iterator[LogitRule]:
    """The rules that a config could mean; libraries disagree on whether a scale multiplies or divides."""
    softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None))), None)
    written = [scale for name in SCALES if (scale := getattr(config, name, None))]
    for scale in (1.0, *written, *(1 / scale for scale in written)):
        yield LogitRule(scale, softcap)


def made_up_hidden(projection: nn.Module) -> Tensor:
    """Hidden states `_NH` that were never computed, to try a head with."""
    weight = next(projection.parameters())
    generator = torch.Generator().manual_seed(0)
    plain = weight.ndim == 2 and weight.is_floating_point() and weight.shape[1] > 1
    width = weight.shape[1] if plain else projection.in_features  # PEFT swaps the features of a tied head's copy
    hidden_NH = torch.randn(PROBE_TOKENS, width, generator=generator).to(weight.device)
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    with torch.no_grad():
        spread = float(projection(hidden_NH.to(dtype)).float().std())
    return (hidden_NH * (PROBE_SPREAD / spread if spread > 0 else 1.0)).to(dtype)


def own_logits(module: PreTrainedModel, hidden_NH: Tensor, token: int = 0) -> Tensor:
    """Logits from the model's own forward, whose trunk answers with `hidden_NH` for this one call.

    Args:
        module: the whole network.
        hidden_NH: of `PROBE_TOKENS` tokens.
        token: the id of all these tokens.

    Raises:
        UserError: its forward is more than a trunk and a head.
    """
    from transformers.modeling_outputs import MoeModelOutputWithPast

    class Answer(MoeModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Whatever else a trunk of this kind returns is absent."""

    inner = trunk(module)
    inner.forward = lambda *_, **__: Answer(last_hidden_state=hidden_NH.unsqueeze(0))
    try:
        ids = torch.full((1, PROBE_TOKENS), token, device=hidden_NH.device)
        return module(input_ids=ids, use_cache=False).logits.squeeze(0)
    except (AttributeError, TypeError, LookupError, RuntimeError) as error:
        raise UserError(
            f"the head of {type(module).__name__} cannot be tried on its own: {error}",
            "Its forward is more than a trunk and a projection.",
            "Use another model, or a plugin that loads this one.",
        ) from error
    finally:
        del inner.forward
