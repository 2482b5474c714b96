"""Beginning with what training rows show: EVA (arXiv:2410.07170), CorDA (arXiv:2406.05223), LoRA-GA (arXiv:2407.05000).

PEFT measures the bare base (activations, their covariances, gradients of the weights) before the adapter exists; the
factors are put in afterwards, in the adapter's data type. EVA's leave the base as it is. CorDA's and LoRA-GA's are
taken out of it, like PiSSA's (`initialization`), so that the export has twice the rank.

The first factors are kept in the run's folder: a resumed run takes them from there and measures nothing again.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_lora.calibration import at_rest, chosen_rows, forward, grouped, on_device, seeing, tensors
from pegbox_lora.config import LoraConfig
from pegbox_lora.initialization import ADAPTER, STATE, FirstFactors, lora_layers

if TYPE_CHECKING:
    from pathlib import Path

    import peft
    from peft.tuners.lora import LoraLayer
    from pegbox.context import Context
    from pegbox.rows import Dataset, Example
    from pegbox.types import Model
    from torch import Tensor
    from torch.nn import Module

Factors = dict[str, tuple["Tensor", "Tensor"]]
FILE = ".lora_first_factors.safetensors"
"""Hidden, so that a folder in which no run began counts as empty."""
SAMPLES = 64
"""So many numbers of each adapted weight tell one base from another."""
PASSES = 100
"""EVA goes over its rows until the directions stand still; after so many rounds they never will."""


class Measured:
    """What is done before the adapter is put in (`measure`) and after (`put_in`)."""

    def __init__(self, ctx: Context, settings: LoraConfig, model: Model, config: peft.LoraConfig) -> None:
        self._ctx, self._settings, self._model, self._config = ctx, settings, model, copy.copy(config)
        self._weightless = next(model.module.parameters()).device.type == "meta"
        self._file = ctx.folder / FILE
        self._kept: Factors | None = None
        self._eva: dict[str, Tensor] = {}
        self._about = ""

    def measure(self, dataset: Dataset | None, names: Sequence[str], heads: Sequence[str]) -> None:
        """Measure the bare base on training rows, unless the run that is resumed has done so.

        Args:
            dataset: rows of the training split.
            names: modules that will be adapted.
            heads: names of the embeddings and the head.

        Raises:
            UserError: a module cannot begin so, no row reaches it, or there are no rows.
        """
        if self._weightless:
            return
        for name in names:
            _require_fit(self._settings, self._rank(name), name, self._model.module.get_submodule(name), heads)
        if dataset is None:
            raise UserError(
                f"lora.init is '{self._settings.init}', but there are no training rows",
                "It begins with what the model does on them.",
                "Name training data, or set lora.init to pissa or default.",
            )
        self._about = self._key(dataset, names)
        self._kept = _read(self._file, self._about) if self._ctx.config.run.resume is not None else None
        if self._kept is None:
            rows = chosen_rows(self._ctx, self._settings, dataset)
            rank, module = max(map(self._rank, names)), self._model.module
            device = getattr(self._ctx.runtime, "device", None)
            with at_rest(module), on_device(module, device), seeing(module, names) as unseen:
                if self._settings.init == "eva":
                    self._eva_directions(rows, unseen, rank)
                elif self._settings.init == "corda":
                    self._covariances(rows, unseen)
                else:
                    self._gradients(rows, unseen)

    def put_in(self) -> None:
        """Give the adapted layers their first factors, and take out of the base what they hold of it."""
        factors: Factors = {}
        for name, layer in () if self._weightless else lora_layers(self._model.module):
            A, B = self._kept[name] if self._kept is not None else self._first(name, layer)
            factors[name] = _place(layer, A, B, changes_base=self._settings.init != "eva")
        if self._settings.init != "eva":
            self._ctx.register_state(STATE, FirstFactors(dict(factors)))
        if factors and self._kept is None and self._ctx.runtime.rank == 0:
            _write(self._file, factors, self._about)

    def _rank(self, name: str) -> int:
        from peft.utils.other import get_pattern_key

        pattern = self._config.rank_pattern
        return int(pattern.get(get_pattern_key(pattern.keys(), name), self._config.r))

    def _key(self, dataset: Dataset, names: Sequence[str]) -> str:
        """What the factors are a function of."""
        digest = hashlib.blake2b(digest_size=16)
        asked = self._settings.model_dump(mode="json", include={"init", "init_rows", "init_tokens", "dtype"})
        ranks = [[name, self._rank(name)] for name in names]
        scales = [self._settings.alpha, dict(self._settings.alpha_pattern), self._settings.use_rslora]
        known = [asked, ranks, scales, dataset.fingerprint, self._ctx.rng("lora/init").seed]
        digest.update(json.dumps(known, sort_keys=True).encode())
        for name in names:
            weight = self._model.module.get_submodule(name).weight.detach().flatten()
            digest.update(weight[:: max(1, weight.numel() // SAMPLES)].float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def _run(self, rows: Sequence[Example]) -> Tensor:
        device = next(self._model.module.parameters()).device
        return forward(self._model, self._model.module, tensors(rows, self._ctx.processor.pad_id, device))

    def _eva_directions(self, rows: Sequence[Example], unseen: set[str], rank: int) -> None:
        from peft import EvaConfig
        from peft.tuners.lora.eva import get_eva_state_dict

        self._config.init_lora_weights, self._config.eva_config = "eva", EvaConfig(rho=1.0)
        device = next(self._model.module.parameters()).device
        groups = grouped(rows, rank)
        given = [tensors(group, self._ctx.processor.pad_id, device) for group in groups]
        _require_tokens(self._settings, given, rank)
        rounds = 0

        def run(module: Module, inputs: dict[str, Tensor]) -> None:
            nonlocal rounds
            rounds += 1
            if rounds > PASSES * (len(given) + 1):
                raise UserError(
                    f"lora.init is 'eva', but the directions do not settle in {PASSES} rounds over the rows",
                    f"Some module sees fewer than {rank} independent directions in them.",
                    "Raise lora.init_rows, lower lora.r, or set lora.init to pissa or default.",
                )
            forward(self._model, module, inputs)
            _require_seen(self._settings, unseen)

        # Every process looks at the same rows, so there is nothing to gather.
        self._eva = get_eva_state_dict(
            self._model.module,
            given,
            peft_config=self._config,
            forward_fn=run,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )

    def _covariances(self, rows: Sequence[Example], unseen: set[str]) -> None:
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        self._config.init_lora_weights, self._config.corda_config = "corda", CordaConfig()

        def run() -> None:
            # PEFT takes one row at a time, and counts padding as data.
            for row in rows:
                self._run([row])
            _require_seen(self._settings, unseen)

        preprocess_corda(self._model.module, self._config, run_model=run)

    def _gradients(self, rows: Sequence[Example], unseen: set[str]) -> None:
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        self._config.init_lora_weights, self._config.lora_ga_config = "lora_ga", LoraGAConfig()

        def step() -> None:
            self._model.module.eval()  # PEFT switches dropout on
            for group in grouped(rows, 1):
                self._run(group).backward()
            _require_seen(self._settings, unseen)

        preprocess_loraga(self._model.module, self._config, step)

    def _first(self, name: str, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        """The factors by PEFT; the base is as it was."""
        import torch

        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if self._settings.init == "eva":
            return self._eva[name].float(), torch.zeros_like(B).float()
        base, dtypes = layer.get_base_layer(), (A.dtype, B.dtype)
        published = base.weight.data
        # They were measured on the device of the process, where the weights may not lie any more.
        if self._settings.init == "corda":
            for part, tensor in vars(base.eigens).items():
                setattr(base.eigens, part, tensor.to(published.device))
            layer.corda_init(ADAPTER, "corda")
        else:
            base._peft_loraga_grad = base._peft_loraga_grad.to(published.device)
            torch.manual_seed(self._ctx.rng(f"lora/init/{name}").seed)
            layer.lora_ga_init(ADAPTER, self._config.lora_ga_config)
        first = (A.data.float(), B.data.float())
        A.data, B.data, base.weight.data = first[0].to(dtypes[0]), first[1].to(dtypes[1]), published
        return first


def _place(layer: LoraLayer, first_A: Tensor, first_B: Tensor, changes_base: bool) -> tuple[Tensor, Tensor]:
    """Set the factors and take them out of the base; what the layer then holds, in float32 on the CPU."""
    import torch

    with torch.no_grad():
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        A.copy_(first_A)
        B.copy_(first_B)
        if changes_base:
            weight = layer.get_base_layer().weight
            held = layer.scaling[ADAPTER] * (B.float() @ A.float())
            held = held.T if getattr(layer, "fan_in_fan_out", False) else held
            weight.data = (weight.data.float() - held.to(weight.device)).to(weight.dtype)
        return A.detach().float().cpu().clone(), B.detach().float().cpu().clone()


def _require_fit(settings: LoraConfig, rank: int, name: str, module: Module, heads: Sequence[str]) -> None:
    import torch
    from transformers.pytorch_utils import Conv1D

    what, fix = "", "Set lora.init to default, or take it out of lora.targets."
    if name in heads or not isinstance(module, torch.nn.Linear | Conv1D):
        what = "no linear layer inside the model"
    elif settings.init != "eva" and not module.weight.is_floating_point():
        what = "quantized"
    else:
        short = min(module.weight.shape)
        need = 2 * rank if settings.init == "lora_ga" else rank
        if need > short:
            what = f"{' x '.join(map(str, module.weight.shape))}, and rank {rank} needs {need} directions"
            fix = "Lower lora.r, or give this module a lower rank in lora.rank_pattern."
    if what:
        raise UserError(
            f"lora.init is '{settings.init}', but {name} is {what}",
            "The factors are found from what goes through a linear layer, and from its weight.",
            fix,
        )


def _require_seen(settings: LoraConfig, unseen: set[str]) -> None:
    if unseen:
        raise UserError(
            f"lora.init is '{settings.init}', but no row reaches {min(unseen)}",
            f"{len(unseen)} of the modules to adapt did nothing on the rows that were looked at.",
            "Raise lora.init_rows, or leave these modules out with lora.exclude.",
        )


def _require_tokens(settings: LoraConfig, given: Sequence[dict[str, Tensor]], rank: int) -> None:
    """PEFT leaves out batches that have fewer trained tokens than directions, and would wait for others forever."""
    counts = [int((one["labels"] != -100).sum()) for one in given]
    if min(counts) < rank:
        raise UserError(
            f"lora.init is 'eva' with rank {rank}, but its rows have {min(counts)} trained tokens",
            "There are no more directions than tokens.",
            "Raise lora.init_rows or lora.init_tokens, or lower lora.r.",
        )


def _read(file: Path, about: str) -> Factors | None:
    """The factors that were kept, if they are of the same rows, settings and base."""
    from safetensors import safe_open

    if not file.is_file():
        return None
    with safe_open(str(file), framework="pt") as opened:
        if (opened.metadata() or {}).get("about") != about:
            return None
        names = sorted({name[:-2] for name in opened.keys()})  # noqa: SIM118 - no mapping
        return {name: (opened.get_tensor(f"{name}.A"), opened.get_tensor(f"{name}.B")) for name in names}


def _write(file: Path, factors: Factors, about: str) -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    named = {f"{name}.{kind}": value for name, pair in factors.items() for kind, value in zip("AB", pair, strict=True)}
    new = file.with_suffix(".new")
    save_file(named, new, metadata={"about": about})
    new.replace(file)
