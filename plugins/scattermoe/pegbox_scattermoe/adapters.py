"""LoRA on stacked experts beside the base product, instead of PEFT's way through a changed weight.

PEFT wraps the experts module once for each adapted parameter, and a wrapper's forward puts W + s B A in the place of W:
a copy of all experts forward, and a dense gradient of it backward, for two factors of rank r. Here the forward of the
outermost wrapper calls the experts with the factors as they are. The parameters, their names, their export, and the
switches of PEFT (active adapters, disabled ones, merged ones) stay PEFT's.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from pegbox.errors import PluginError
from pegbox.types import ModulePatch

from pegbox_scattermoe.seam import PARTS, layer_of

if TYPE_CHECKING:
    from pegbox.types import Model
    from pegbox_kernels.experts import ExpertLora
    from torch import Tensor
    from torch.nn import Module

KEYWORD = {"gate_up_proj": "lora_gate_up", "down_proj": "lora_down"}


def patches(model: Model) -> list[ModulePatch]:
    """The record for adapted experts; none if no adapter is on them.

    Raises:
        PluginError: an adapter does more than the operation computes.
    """
    chains = {chain[0]: chain for chain in _chains(model.module)}
    if not chains:
        return []
    names = {module: name for name, module in model.module.named_modules()}
    for outermost, chain in chains.items():
        _require_plain(chain, names[outermost])
    return [
        ModulePatch(
            slot="experts",
            target=lambda _, module: module in chains,
            replace=lambda module: _forward(chains[module]),
            reason=f"LoRA on {len(chains)} modules of experts beside the product, never as a changed weight",
            source="arXiv:2106.09685",
        )
    ]


def _chains(module: Module) -> list[list[Any]]:
    """PEFT's wrappers around each module of experts that this plugin computes, outermost first."""
    if find_spec("peft") is None:
        return []
    from peft.tuners.lora.layer import ParamWrapper

    wrappers = [part for part in module.modules() if isinstance(part, ParamWrapper)]
    inner = {part.base_layer for part in wrappers}
    found = []
    for outermost in (part for part in wrappers if part not in inner):
        chain = [outermost]
        while isinstance(chain[-1].base_layer, ParamWrapper):
            chain.append(chain[-1].base_layer)
        if layer_of(chain[-1].base_layer) is not None:
            found.append(chain)
    return found


def _require_plain(chain: list[Any], name: str) -> None:
    """Raise unless every wrapper is plain LoRA on a stacked weight."""
    for wrapper in chain:
        what = ""
        if wrapper.parameter_name not in PARTS:
            what = f"an adapter on {wrapper.parameter_name}"
        elif wrapper.lora_variant or any(wrapper.use_dora.values()):
            what = f"a variant of LoRA on {wrapper.parameter_name}"
        elif any(not isinstance(part, torch.nn.Identity) for part in wrapper.lora_dropout.values()):
            what = f"dropout on {wrapper.parameter_name}"
        if what:
            raise PluginError(
                f"{name} has {what}",
                f"scattermoe computes plain LoRA on {' and '.join(PARTS)}.",
                "Remove scattermoe from plugins, or correct the section of the plugin that applies adapters.",
            )


def _forward(chain: list[Any]) -> Callable[..., Tensor]:
    outermost, experts = chain[0], chain[-1].base_layer

    def forward(hidden_TH: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        outermost._check_forward_args(hidden_TH, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        loras = {KEYWORD[wrapper.parameter_name]: lora_of(wrapper) for wrapper in chain}
        out_TH: Tensor = experts(hidden_TH, *args, **kwargs, **loras)
        return out_TH

    return forward


def lora_of(wrapper: Any) -> ExpertLora | None:
    """The update that a wrapper adds right now, in the operation's layout; None: adapters are off, or merged.

    Several active adapters are one of the sum of their ranks, their scales in the second factors.
    """
    from pegbox_kernels.experts import ExpertLora

    if wrapper.disable_adapters:
        if wrapper.merged:
            wrapper.unmerge()
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.merged or not names:
        return None
    factors = [(*factors_of(wrapper, name), wrapper.scaling[name]) for name in names]
    if len(factors) == 1:
        return ExpertLora(*factors[0])
    a_ERI = torch.cat([a for a, _, _ in factors], dim=1)
    b_EOR = torch.cat([b * scale for _, b, scale in factors], dim=2)
    return ExpertLora(a_ERI, b_EOR, 1.0)


def factors_of(wrapper: Any, name: str) -> tuple[Tensor, Tensor]:
    """Views of PEFT's two matrices as (E, R, in) and (E, out, R).

    What PEFT calls in and out are dimensions 1 and 2 of a weight, or 2 and 1 if it has swapped them; where a module
    stores its weights the other way round, the factors change places.
    """
    from pegbox_kernels.experts.lora_layout import from_peft

    a, b = from_peft(wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts)
    if wrapper._did_swap_in_out_features != wrapper.get_base_layer().is_transposed:
        return a, b
    return b.transpose(1, 2), a.transpose(1, 2)
