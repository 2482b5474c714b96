"""A small network of norms, attentions and blocks, and what replaces its modules, for tests of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pegbox.patches import PatchLog
from pegbox.types import Model, ModulePatch

torch = pytest.importorskip("torch")
nn = torch.nn


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x: Any) -> Any:
        return x / x.norm() * self.weight


class Attention(nn.Module):
    implementation = "eager"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Any) -> Any:
        return self.o_proj(self.q_proj(x))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.self_attn, self.norm = Attention(width), Norm(width)
        self.register_buffer("scale", torch.rand(1))

    def forward(self, x: Any) -> Any:
        return x + self.self_attn(self.norm(x)) * self.scale


class Network(nn.Module):
    def __init__(self, width: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, 8, bias=False)

    def forward(self, ids: Any) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


IDS = torch.tensor([[1, 2, 3]])


def model_of(module: Any, *traits: str) -> Model:
    compute: Any = None
    return Model(
        module=module, name="tiny", base="tiny", format="transformers", compute=compute, traits=frozenset(traits)
    )


class Doubled(nn.Module):
    """Takes the place of a module and keeps it inside."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.old = old

    def forward(self, x: Any) -> Any:
        return 2 * self.old(x)


class Zero(nn.Module):
    """Takes the place of a module and drops it."""

    def __init__(self, old: Any) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return torch.zeros_like(x)


def doubled_forward(old: Any) -> Callable[[Any], Any]:
    before = old.forward
    return lambda x: 2 * before(x)


def patch(target: Any, replace: Callable[[Any], Any] = Doubled, slot: str = "norm", **options: Any) -> ModulePatch:
    return ModulePatch(slot=slot, target=target, replace=replace, reason=f"a faster {slot}", **options)


def apply(log: PatchLog, model: Model, *patches: ModulePatch, by: str = "fast") -> None:
    log.apply(model, [(by, patches)])


def picture(module: Any) -> tuple[object, ...]:
    """Everything that undo must bring back: objects, classes, instance attributes, and the bytes of all tensors."""
    tree = [(name, id(part), type(part), list(part._modules)) for name, part in module.named_modules()]
    attributes = [{**vars(part), "_modules": dict(part._modules)} for part in module.modules()]
    bytes_of = {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}
    return tree, attributes, bytes_of, list(bytes_of)
