"""Proof that the module that samples holds an update: it is the policy, so nothing is sent and everything compared.

Of each parameter that the update names, `SAMPLED` numbers at even distances are read back from the module and compared,
bit for bit, with the update's; the digest of what was read is the evidence.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from pegbox.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pegbox.rollouts import WeightUpdate
    from torch import Tensor
    from torch.nn import Module

SAMPLED = 16
PEFT_ROOT, PEFT_NAME = "base_model.model.", ".default"


def evidence_of(update: WeightUpdate, module: Module) -> str:
    """What was compared, in words.

    Raises:
        RunError: the update names no parameter of the module, or holds other numbers than it.
    """
    held = {_plain(name): tensor for name, tensor in module.named_parameters()}
    digest, compared, foreign = hashlib.blake2b(digest_size=8), 0, 0
    for name, tensor in update.tensors:
        own = held.get(_plain(name))
        if own is None:
            foreign += 1
            continue
        read = _sample(own)
        if own.shape != tensor.shape or read != _sample(tensor.to(own.dtype)):
            raise RunError(
                f"rollout-hf does not hold version {update.version}: '{name}' differs",
                "It samples with the policy itself, which is not what the update says.",
                "Send the update before the next optimizer step, and from the policy.",
            )
        digest.update(name.encode() + read)
        compared += 1
    if foreign and not compared:
        raise RunError(
            f"rollout-hf cannot prove version {update.version}: none of its {foreign} tensors is one of the policy's",
            "It samples with the policy itself, whose parameters have other names.",
            "Send the update from the policy of this run.",
        )
    if not compared:
        digest = _digest_of(held)
        return f"samples with the policy itself, whose {len(held)} parameters have the digest {digest.hexdigest()}"
    return f"samples with the policy itself; {compared} of its parameters are the update's, digest {digest.hexdigest()}"


def version_marks(module: Module) -> tuple[int, ...]:
    """Changes with every optimizer step: torch counts what is written into each trained parameter."""
    return tuple(parameter._version for parameter in module.parameters() if parameter.requires_grad)


def _digest_of(held: Mapping[str, Tensor]) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in _trained(held.items()):
        digest.update(name.encode() + _sample(tensor))
    return digest


def _trained(items: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    every = list(items)
    return [(name, tensor) for name, tensor in every if tensor.requires_grad] or every


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLED)
    return bytes(flat[::step][:SAMPLED].contiguous().cpu().view(torch.uint8).numpy())


def _plain(name: str) -> str:
    """A name without what PEFT puts around it."""
    return name.removeprefix(PEFT_ROOT).replace(PEFT_NAME, "")
