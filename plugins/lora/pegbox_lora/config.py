"""The section `lora` of a config."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pegbox.errors import did_you_mean
from pegbox.section import Section, setting
from pydantic import Field, model_validator

ALL_LINEAR = "all-linear"
FRESH = ("default", "gaussian", "orthogonal")
"""Initialisations that leave the base as it is."""
FROM_BASE = ("pissa", "olora")
"""Initialisations that take their factors out of the base weight."""
MEASURED = ("eva", "corda", "lora_ga")
"""Initialisations that look at training rows."""
REFUSED = {
    "loftq": "replaces the base by a quantized copy, and no adapter of a low rank brings the published base back",
    "mica": "freezes one of its two factors, so half of the adapter would never receive a gradient",
}
"""Initialisations of PEFT that are not offered, and why."""
Rank = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(gt=0)]
Token = Annotated[int, Field(ge=0)] | str


class LoraConfig(Section):
    """What is adapted, and how. Rank 16 with alpha 32 on all linear layers: Biderman et al. 2024, arXiv:2405.09673."""

    r: int = setting(16, "Rank of the update of each weight.", ge=1)
    alpha: float = setting(32.0, "Scale of the update: it is multiplied by alpha / r (rsLoRA: alpha / sqrt(r)).", gt=0)
    rank_pattern: dict[str, Rank] = setting(
        {}, "Other ranks by module: {pattern: rank}; the regular expression matches the end of a name, the first wins."
    )
    alpha_pattern: dict[str, Scale] = setting({}, "Other alphas by module, like rank_pattern.")
    dropout: float = setting(0.0, "Probability that an input of the adapter is dropped.", unit="1", ge=0, lt=1)
    targets: str | tuple[str, ...] = setting(
        ALL_LINEAR,
        "Modules to adapt: `all-linear` (all but the head), a list of names or ends of names, or a regular expression "
        "that matches whole names.",
    )
    exclude: str | tuple[str, ...] = setting(
        (), "Modules that are not adapted after all: names or ends of names, or a regular expression for whole names."
    )
    layers: tuple[int, ...] = setting((), "Numbers of the layers to adapt, counted from 0; none means all of them.")
    layers_pattern: tuple[str, ...] = setting(
        (), "Names of the lists that `layers` counts in, where a model has several; the first number in a name else."
    )
    parameters: tuple[str, ...] = setting(
        (), "Ends of names of stacked expert weights to adapt, such as `experts.gate_up_proj`; they are no modules."
    )
    modules_to_save: tuple[str, ...] = setting((), "Modules that are trained in full and kept with the adapter.")
    tokens: tuple[Token, ...] = setting((), "Tokens, by text or id, whose embeddings are trained; all others stay.")
    token_modules: tuple[str, ...] = setting(
        (), "Modules whose rows `tokens` trains; the input embeddings if not set. A tied head follows them."
    )
    bias: Literal["none", "all", "lora_only"] = setting(
        "none", "Which biases of the base are trained: none, all, or those of adapted modules."
    )
    init: str = setting(
        "default",
        "How the factors begin: `default` (first Kaiming-uniform, second zero), `gaussian`, `orthogonal`, `pissa`, "
        "`pissa_niter_N` (fast singular values in N rounds), `olora`; from training rows: `eva`, `corda`, `lora_ga`.",
    )
    init_rows: int = setting(64, "Training rows that `eva`, `corda` and `lora_ga` look at.", unit="rows", ge=1)
    init_tokens: int = setting(512, "Tokens to which these rows are cut.", unit="tokens", ge=2)
    use_rslora: bool = setting(False, "Scale by alpha / sqrt(r) (rsLoRA, arXiv:2312.03732).")
    use_dora: bool = setting(
        False, "Train the length of each weight's columns apart from their direction (DoRA, arXiv:2402.09353)."
    )
    lr_ratio: float | None = setting(
        None,
        "Learning rate of the second matrices as a multiple of the first ones' (LoRA+, arXiv:2402.12354).",
        unit="1",
        gt=0,
    )
    embedding_lr: float | None = setting(None, "Learning rate of adapters on embeddings.", unit="1", gt=0)
    adapter: str | None = setting(
        None,
        "Folder of a run or of a PEFT adapter that is trained further, with its own rank and targets.",
        min_length=1,
    )
    dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", "Data type of the adapter's parameters.")

    @model_validator(mode="after")
    def _fits(self) -> LoraConfig:
        self._expressions()
        self._initialisation()
        self._combinations()
        self._layers()
        return self

    def _expressions(self) -> None:
        written = {
            f"{key} {value!r}": value for key in ("targets", "exclude") if isinstance(value := getattr(self, key), str)
        }
        written |= {f"{key} {p!r}": p for key in ("rank_pattern", "alpha_pattern") for p in getattr(self, key)}
        written |= {f"layers_pattern {p!r}": p for p in self.layers_pattern}
        for place, expression in written.items():
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{place} is no regular expression: {error}; list names instead") from error

    def _initialisation(self) -> None:
        if self.init in REFUSED:
            raise ValueError(f"init: {self.init} {REFUSED[self.init]}; set init to pissa or default")
        known = (*FRESH, *FROM_BASE, *MEASURED)
        if self.init not in known and not re.fullmatch(r"pissa_niter_[1-9]\d*", self.init):
            hint = did_you_mean(self.init, [*known, "pissa_niter_4"], "Known:")
            raise ValueError(f"init is '{self.init}', which is no initialization. {hint}")
        for key in ("init_rows", "init_tokens"):
            if self.init not in MEASURED and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is set, but init is '{self.init}', which looks at no rows; remove {key}")
        if self.init == "eva" and len({self.r, *self.rank_pattern.values()}) > 1:
            raise ValueError("init: eva takes one rank for all modules; remove rank_pattern")
        ranks = {self.r, *self.rank_pattern.values()}
        odd = sorted(rank for rank in ranks if rank % 2)
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init: orthogonal needs even ranks, but one is {odd[0]}; set it to {odd[0] + 1}")

    def _combinations(self) -> None:
        if not self.targets and not self.parameters:
            raise ValueError("targets is empty and so is parameters: nothing would be adapted; set targets: all-linear")
        if self.parameters and (self.dropout or self.use_dora or self.init not in ("default", "gaussian")):
            raise ValueError(
                "parameters (stacked experts) take no dropout, no DoRA and no init but default and gaussian; "
                "switch these off"
            )
        twice = set(self.modules_to_save) & set(self.targets if isinstance(self.targets, tuple) else ())
        if twice:
            raise ValueError(
                f"{', '.join(sorted(twice))} is in targets and in modules_to_save; remove it from one of them"
            )
        twice_whole = set(self.modules_to_save) & set(self.token_modules)
        if twice_whole:
            raise ValueError(
                f"{', '.join(sorted(twice_whole))} is in modules_to_save, so all of its rows are trained; "
                "remove it from token_modules"
            )
        if self.token_modules and not self.tokens:
            raise ValueError("token_modules is set, but tokens is not: it would do nothing; set tokens")
        if len(set(self.tokens)) != len(self.tokens):
            raise ValueError("tokens names a token twice; remove one of them")

    def _layers(self) -> None:
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR and self.layers:
            raise ValueError(
                "layers cannot be combined with a regular expression; write the layers into the expression"
            )
        if any(layer < 0 for layer in self.layers):
            raise ValueError(f"layers holds {min(self.layers)}; layers are counted from 0")
        if self.layers_pattern and not self.layers:
            raise ValueError("layers_pattern is set, but layers is not: it would do nothing; set layers")
