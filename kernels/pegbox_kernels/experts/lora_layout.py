"""Expert LoRA in the layouts of others, to and from the canonical one: a (E, R, in), b (E, out, R).

    canonical                       a (E, R, in)                       b (E, out, R)
    PEFT, `target_parameters`       lora_A (E R, in): row e R + r      lora_B (out, R E): column r E + e
    vLLM, one pair for all experts  the same as PEFT's
    one adapter for each expert     experts.<e>.<name>.lora_A (R, in)  experts.<e>.<name>.lora_B (out, R)

PEFT has the expert slowest in A and **fastest** in B. Whoever reads its B with the expert slowest multiplies expert 0's
rank by columns of all experts: shapes fit, numbers do not. The tests compare with PEFT's own delta, and with what a
real vLLM answers.

vLLM (0.32) reads PEFT's layout where its model holds stacked experts (gpt-oss), and adapters of single experts where it
does not (Qwen3-MoE); started with `--enable-mixed-moe-lora-format` it reads both for all. It calls the products of an
expert by the names of its own model: see `GATE_UP_DOWN` and `W1_W3_W2`.

`in` and `out` are those of the product, whichever way the base weight lies. The scale is no part of a layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The names of gate, up and down: most models', and those of Mixtral and of vLLM's gpt-oss.
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2 = ("w1", "w3", "w2")


def from_peft(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's weights of one `target_parameters` wrapper -> a (E, R, in), a view, and b (E, out, R), a strided view.

    Raises:
        ValueError: the rank dimension is not a multiple of `experts`.
    """
    rank = _rank(lora_a, lora_b, experts)
    return lora_a.reshape(experts, rank, -1), lora_b.reshape(-1, rank, experts).permute(2, 0, 1)


def to_peft(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """a (E, R, in), b (E, out, R) -> `lora_A.weight` (E R, in), `lora_B.weight` (out, R E), contiguous."""
    packed = b_EOR.permute(1, 2, 0).reshape(b_EOR.shape[1], -1)
    return a_ERI.reshape(-1, a_ERI.shape[2]).contiguous(), packed.contiguous()


def to_per_expert(
    gate_up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    interleaved: bool,
    prefix: str = "experts",
    names: tuple[str, str, str] = GATE_UP_DOWN,
) -> dict[str, Tensor]:
    """Canonical pairs -> an adapter for each expert and product, under the names that PEFT's linear layers use.

    Gate and up share the A of their common product: each gets a copy of it. `names` are those of gate, up and down.
    """
    gate_name, up_name, down_name = names
    found: dict[str, Tensor] = {}
    gates, ups = _halves(gate_up[1], interleaved)
    for expert in range(gate_up[0].shape[0]):
        for name, a, b in (
            (gate_name, gate_up[0], gates),
            (up_name, gate_up[0], ups),
            (down_name, *down),
        ):
            found[f"{prefix}.{expert}.{name}.lora_A.weight"] = a[expert].clone(memory_format=torch.contiguous_format)
            found[f"{prefix}.{expert}.{name}.lora_B.weight"] = b[expert].clone(memory_format=torch.contiguous_format)
    return found


def from_per_expert(
    tensors: Mapping[str, Tensor],
    experts: int,
    *,
    interleaved: bool,
    prefix: str = "experts",
    names: tuple[str, str, str] = GATE_UP_DOWN,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An adapter for each expert and product -> canonical pairs of gate_up and down.

    Gate and up become one product of the sum of their ranks, whose B is zero where the other's rank begins; if their
    As are equal in every expert (as `to_per_expert` writes them), the rank stays.

    Raises:
        ValueError: a tensor is missing.
    """

    def stacked(name: str, side: str) -> Tensor:
        keys = [f"{prefix}.{expert}.{name}.lora_{side}.weight" for expert in range(experts)]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is not among the {len(tensors)} tensors. Check `prefix` and `experts`.")
        return torch.stack([tensors[key] for key in keys])

    gate, up, down = names
    a_gate, a_up, b_gate, b_up = stacked(gate, "A"), stacked(up, "A"), stacked(gate, "B"), stacked(up, "B")
    if a_gate.shape == a_up.shape and torch.equal(a_gate, a_up):
        a = a_gate
    else:
        a = torch.cat((a_gate, a_up), dim=1)
        rank = a_gate.shape[1]
        b_gate = torch.nn.functional.pad(b_gate, (0, a.shape[1] - rank))
        b_up = torch.nn.functional.pad(b_up, (rank, 0))
    b = torch.stack((b_gate, b_up), dim=2).flatten(1, 2) if interleaved else torch.cat((b_gate, b_up), dim=1)
    return (a, b), (stacked(down, "A"), stacked(down, "B"))


def _halves(b_EJR: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return b_EJR[:, ::2], b_EJR[:, 1::2]
    gate, up = b_EJR.chunk(2, dim=1)
    return gate, up


def _rank(lora_a: Tensor, lora_b: Tensor, experts: int) -> int:
    packed = lora_a.shape[0]
    if lora_a.ndim != 2 or lora_b.ndim != 2 or packed % experts or lora_b.shape[1] != packed:
        raise ValueError(
            f"A {tuple(lora_a.shape)} and B {tuple(lora_b.shape)} of {experts} experts: they must be (E R, in) and "
            "(out, E R). Check the number of experts."
        )
    return packed // experts
