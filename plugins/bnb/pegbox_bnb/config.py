"""The section `bnb` of a config."""

from __future__ import annotations

from typing import Literal

from pegbox.section import Section, setting
from pydantic import model_validator

Float = Literal["float32", "bfloat16", "float16"]
FOUR_BITS_ONLY = ("double_quant", "storage_dtype", "compute_dtype")


class BnbConfig(Section):
    """How the frozen base is stored. The defaults are those of QLoRA (arXiv:2305.14314)."""

    kind: Literal["nf4", "fp4", "int8"] = setting(
        "nf4", "4-bit normal floats, 4-bit floats, or 8-bit integers (LLM.int8, arXiv:2208.07339)."
    )
    double_quant: bool = setting(True, "Quantize the scales of 4-bit blocks too: 0.37 bits less for each weight.")
    compute_dtype: Literal["auto"] | Float = setting(
        "auto",
        "Data type in which 4-bit weights are multiplied; `auto`: bfloat16 where the device has it, else float32.",
    )
    storage_dtype: Literal["uint8"] | Float = setting(
        "uint8",
        "Data type that 4-bit weights are packed into; sharding over processes wants that of the other weights.",
    )
    outlier_threshold: float = setting(
        6.0, "Inputs of int8 layers larger than this are multiplied in 16 bits; 0 multiplies none so.", unit="1", ge=0
    )
    skip: tuple[str, ...] = setting(
        (), "Linear layers that are not quantized: names, ends of names, or regular expressions from the name's start."
    )
    experts: Literal["refuse", "keep"] = setting(
        "refuse",
        "What to do with stacked expert weights, which bitsandbytes cannot quantize: stop, or keep them as they are.",
    )

    @model_validator(mode="after")
    def _fits(self) -> BnbConfig:
        other = ("outlier_threshold",) if self.kind != "int8" else FOUR_BITS_ONLY
        idle = [name for name in other if getattr(self, name) != type(self).model_fields[name].default]
        if idle:
            raise ValueError(f"{idle[0]} has no effect on {self.kind}; remove it")
        return self
