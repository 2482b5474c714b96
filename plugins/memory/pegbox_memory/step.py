"""One step of training of a config, on tensors without data.

    the optimizer steps once with gradients of every trained parameter, so that its state is there
    forward, loss and backward of one micro-batch, or of two where gradients are accumulated

in the order of the run, with the precision, the patches and the loss that the run would have. Rows are as long as they
can be and every token is trained. On a machine without CUDA, torch's CPU operators stand for those of CUDA: shapes and
data types of what they keep are the same. Plain rows stand for packed ones there: the attention of these asks for the
values of borders on a CPU, and needs no mask either.

    B  rows    T  tokens of a row    N  trained tokens    S  document borders
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from pegbox import hooks
from pegbox.assembly import model_request, prepare_model
from pegbox.errors import PegboxError, RunError
from pegbox.merging import merge_groups
from pegbox.rows import Batch
from pegbox.types import Loss, Model, ModelRequest
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from pegbox_memory.batches import batch_for, kind_of
from pegbox_memory.generation import Generation, Peak, sampling_peak
from pegbox_memory.kernels import allocating
from pegbox_memory.ledger import Ledger, is_made_of_others
from pegbox_memory.quantized import StoredBytes, stored_bytes

if TYPE_CHECKING:
    from pegbox.context import Context
    from torch.optim import Optimizer

HEAD = "token_head"
STEPS = 1000
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Precision = Literal["fp32", "bf16", "fp16"]


class OneProcess:
    """The runtime of an estimate (`pegbox.types.Runtime`)."""

    rank = local_rank = 0
    world_size = 1

    def __init__(self, device: torch.device, precision: Precision) -> None:
        self.device = device
        self.precision: Precision = precision

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather_objects(self, value: object) -> list[object]:
        return [value]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass
class TrainedStep:
    """A model ready to be trained on tensors without data; `peak` trains it for a step.

    Attributes:
        layers: how many layers it has.
        stored: what quantization makes of its frozen weights.
        notes: what the estimate takes for granted.
        for_gpu: the run would compute on a GPU, so operations with kernels of their own allocate as they do there.
    """

    ctx: Context
    model: Model
    loss: Loss
    optimizer: Optimizer
    ledger: Ledger
    mode: Any
    device: torch.device
    precision: Precision
    layers: int
    stored: StoredBytes
    step_peak: Peak
    notes: list[str] = field(default_factory=list)
    for_gpu: bool = False
    sampled: dict[Generation, Peak] = field(default_factory=dict)
    reference: Model | None = None

    def peak(self, rows: int, tokens: int, *, bins: bool, micro_batches: int, prompt: int = 0) -> Peak:
        """The peak of a step of micro-batches of `rows` rows of `tokens` tokens; of bins of documents if `bins`.

        Raises:
            RunError: the model computes something that needs the values of its tensors.
        """
        ledger, kind = self.ledger, kind_of(self.loss)
        packed = bins and self.device.type == "cuda"
        if bins and not packed and kind == "pairs":
            tokens //= 2  # a bin holds both answers
        with self.mode, ledger:
            with ledger.noting("batch"):
                batch = batch_for(
                    self.loss, kind, rows, tokens, self.device, packed=packed, prompt=0 if bins else prompt
                )
            ledger.during = "forward and backward"
            ledger.restart()
            with _explained(self.model), self._kernels():
                for _ in range(min(micro_batches, 2)):
                    self._forward_backward(batch)
            peak = Peak(dict(ledger.peak), ledger.peak_during)
            self.optimizer.zero_grad(set_to_none=True)
            del batch
        return peak if peak.total > self.step_peak.total else self.step_peak

    def sampling_peak(self, generation: Generation) -> Peak:
        """The peak while completions are sampled; computed once."""
        if generation not in self.sampled:
            with _explained(self.model), self._kernels():
                self.sampled[generation] = sampling_peak(self, generation)
        return self.sampled[generation]

    def _kernels(self) -> AbstractContextManager[None]:
        """On a GPU their kernels compute, whether there is one here or not."""
        return allocating() if self.for_gpu else nullcontext()

    def arithmetic(self) -> AbstractContextManager[None]:
        """The run's precision."""
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.device.type, dtype=dtype) if dtype is not None else nullcontext()

    def _forward_backward(self, batch: Batch) -> None:
        self.ledger.during = "forward"
        with self.arithmetic():
            outputs = self.model.compute(self.model.module, batch, self.loss.needs)
        terms = self.loss(batch, outputs).terms
        del outputs
        counts = [1.0 if isinstance(term.count, Tensor) else max(term.count, 1.0) for term in terms]
        total = sum((t.total * (t.weight / n) for t, n in zip(terms, counts, strict=True)), torch.zeros(()))
        del terms
        self.ledger.during = "backward"
        with self.ledger.noting("backward"):
            total.backward()


def trained_step(
    ctx: Context, device: torch.device, precision: Precision, *, fake: bool = True, for_gpu: bool = False
) -> TrainedStep:
    """Build what a run would train.

    Args:
        ctx: a composed config; its runtime and length are set here.
        device: where tensors would lie; a device that this torch can compute on.
        precision: of forwards.
        for_gpu: the run would be on a GPU, also where there is none.
        fake: tensors have no data; with data (on a CPU) the same is counted for real.
    """
    ctx.runtime, ctx.total_steps = OneProcess(device, precision), STEPS
    request = model_request(ctx)
    model = prepare_model(ctx, replace(request, meta=True))
    stored = stored_bytes(model.module, request.options.quantization)
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    projection = _asked(model.module, "get_output_embeddings")
    ledger = Ledger(device.type, vocabulary=None if projection is None else int(projection.weight.shape[0]))
    with mode:
        put(model.module, device)
    model.module.train()
    layers = layers_of(model.module)
    _note_parameters(ledger, model.module, adapted=ctx.owned(hooks.apply_adapters))
    _watch(ledger, model.module, layers)
    reference = reference_copy(ctx, request)
    if reference is not None:
        with mode:
            put(reference.module, device)
        ledger.note(dict.fromkeys([*reference.module.parameters(), *reference.module.buffers()]), "reference")
    loss = ctx.call(hooks.build_loss, ctx, model)
    groups = merge_groups(model, ctx.each(hooks.configure_groups, ctx, model))
    with mode, ledger:
        optimizer = ctx.call(hooks.build_optimizer, ctx, model, groups).optimizer
        notes = _first_step(ledger, optimizer)
    packed = any(is_made_of_others(type(weight)) for weight in model.module.parameters())
    if "quantized" in model.traits and not packed:
        notes.append("the weights are stored quantized, and counted as the model is built without them")
    peak = Peak(dict(ledger.peak), ledger.peak_during)
    made = (ctx, model, loss, optimizer, ledger, mode, device, precision, len(layers), stored, peak, notes)
    return TrainedStep(*made, for_gpu=for_gpu, reference=reference)


def reference_copy(ctx: Context, request: ModelRequest) -> Model | None:
    """The second model that the plugin reference would hold, on meta; None where it holds none."""
    section = ctx.config.resolved().get("reference")
    adapted = ctx.owned(hooks.apply_adapters)
    how = section["how"] if section else "adapter"
    if how in ("adapter", "precomputed") or (how == "auto" and adapted):
        return None
    options = request.options
    if section["dtype"] != "policy" or not adapted:
        options = replace(options, dtype="float32" if section["dtype"] == "policy" else section["dtype"])
    name, revision = section["model"] or request.name, section["revision"] if section["model"] else request.revision
    return ctx.call(
        hooks.load_model,
        ctx,
        replace(request, name=name, revision=revision, role="reference", meta=True, options=options),
    )


def put(module: nn.Module, device: torch.device) -> None:
    """Give a module on the meta device tensors on another one, whose values mean nothing; ties stay."""
    made: dict[int, Any] = {}

    def plain(tensor: Any) -> Tensor:
        if not is_made_of_others(type(tensor)):
            return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        names, context = tensor.__tensor_flatten__()
        parts = {name: plain(getattr(tensor, name)) for name in names}
        packed: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        return packed

    def on_device(tensor: Tensor) -> Tensor:
        new = plain(tensor)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    made.setdefault(id(tensor), (tensor, on_device(tensor)))
                    own[name] = made[id(tensor)][1]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of a network: the outermost list of modules that holds the most parameters."""
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        return []
    return list(max(lists, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -len(item[0])))[1])


def _note_parameters(ledger: Ledger, module: nn.Module, *, adapted: bool) -> None:
    parameters = dict.fromkeys(module.parameters())
    ledger.note((p for p in parameters if not p.requires_grad), "frozen weights")
    ledger.note((p for p in parameters if p.requires_grad), "adapters" if adapted else "trained weights")
    ledger.note(dict.fromkeys(module.buffers()), "buffers")
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.note([p.grad], "gradients"))


def _watch(ledger: Ledger, module: nn.Module, layers: list[nn.Module]) -> None:
    """Note what is computed in layers and in the head as theirs; what a layer returns is the next one's input."""
    heads = [part for name, part in module.named_modules() if name.rpartition(".")[2] == HEAD]
    projection = _asked(module, "get_output_embeddings")
    for kind, parts in (("layers", layers), ("head", [*heads, *([projection] if projection is not None else [])])):
        for part in parts:
            before: list[str] = []

            def enter(*_: object, kind: str = kind, before: list[str] = before) -> None:
                before.append(ledger.kind)
                ledger.kind = kind

            def leave(*_: object, before: list[str] = before) -> None:
                ledger.kind = before.pop()

            part.register_forward_pre_hook(enter)
            part.register_forward_hook(leave, always_call=True)


def _first_step(ledger: Ledger, optimizer: Optimizer) -> list[str]:
    """Have the optimizer make its state; a note where it must be told by rule."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with ledger.noting("gradients"):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    ledger.during = "optimizer step"
    note = ""
    with ledger.noting("optimizer"):
        try:
            optimizer.step()
        except Exception as error:
            optimizer.state.clear()
            width, note = _state_bytes(optimizer, error)
            for parameter in parameters:
                made = torch.zeros(round(parameter.numel() * width), dtype=torch.uint8, device=parameter.device)
                optimizer.state[parameter] = {"counted": made}
    optimizer.zero_grad(set_to_none=True)
    return [note] if note else []


def _state_bytes(optimizer: Optimizer, error: Exception) -> tuple[float, str]:
    """Bytes of state for each parameter of an optimizer that cannot step without data, by its name."""
    name = type(optimizer).__name__.lower()
    both = (("8bit", 2.0 + 2 * 4 / 256), ("4bit", 1.0 + 2 * 4 / 128), ("fp8", 2.0 + 2 * 4 / 256))
    width = next((width for part, width in both if part in name), 8.0)
    said = (str(error).splitlines() or [repr(error)])[0]
    return width, f"{type(optimizer).__name__} is counted with {width:.2f} bytes per trained parameter: {said}"


@contextmanager
def _explained(model: Model) -> Iterator[None]:
    with ExitStack() as stack:
        stance = getattr(torch.compiler, "set_stance", None)
        if stance is not None:
            stack.enter_context(stance("force_eager"))
        try:
            yield
        except PegboxError:
            raise
        except Exception as error:
            raise RunError(
                f"a step of {model.name} cannot be made without data: {(str(error).splitlines() or [repr(error)])[0]}",
                "Something of its forward or backward asks for the values of tensors, or has no rule for their shapes.",
                "Estimate without the plugin that brings it, or measure: the run writes peak_memory_bytes.",
            ) from error


def _asked(module: nn.Module, name: str) -> Any:
    ask = getattr(module, name, None)
    return ask() if ask is not None else None
