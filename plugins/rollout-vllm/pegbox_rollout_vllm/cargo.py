"""Weights on their way to a vLLM: a folder that was exported, or the trainer's own tensors."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pegbox import hooks
from pegbox.errors import RunError
from pegbox.types import ExportRequest
from safetensors import safe_open

from pegbox_rollout_vllm.live import LiveWeights

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.types import Model
    from torch import Tensor


class Cargo(Protocol):
    """Weights under the names of an exported checkpoint."""

    def seal(self, label: str) -> str:
        """Its final name, `pegbox-<8 hexadecimal digits>-<label>`; the first rank asks once, when all is there."""

    def tensors(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Its tensors by name, read when they are asked for."""

    def discard(self) -> None:
        """Nobody needs it any more."""


Pack = Callable[[str, Sequence[float], Path | None], Cargo]
"""Makes the cargo of a label; every rank takes part. Further: the trainer's log-probabilities of the probes, and a
folder that somebody exported already."""
Deliver = Callable[[str, Cargo], None]
"""Brings full weights of a name to vLLM; the first rank does."""


class Folder:
    """A folder of safetensors files; `temporary`: it is renamed when it is whole, and removed in the end."""

    def __init__(self, path: Path, *, temporary: bool = False) -> None:
        self.path, self._temporary = path.absolute(), temporary

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.path == other.path

    __hash__ = None  # type: ignore[assignment]

    def seal(self, label: str) -> str:
        """Named after its weights.

        Raises:
            RunError: the folder holds none.
        """
        name = f"pegbox-{self._digest()[:8]}-{label}"
        if self._temporary:
            place = self.path.with_name(name)
            if place.is_dir():  # weights that are there already are the same ones
                shutil.rmtree(self.path)
                self.path = place
            else:
                self.path = self.path.rename(place)
        return name

    def _digest(self) -> str:
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise RunError(
                f"{self.path} holds no safetensors file",
                "vLLM reads weights from such files.",
                "Use a model and an adapter that are exported as safetensors.",
            )
        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
        return digest.hexdigest()

    @contextmanager
    def tensors(self) -> Iterator[Mapping[str, Tensor]]:
        with ExitStack() as stack:
            yield _Files(self.path, stack)

    def discard(self) -> None:
        if self._temporary:
            shutil.rmtree(self.path)


class _Files(Mapping[str, "Tensor"]):
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._files: dict[str, safe_open] = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = stack.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(opened.keys(), opened))

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Exports:
    """Packs by exporting, as at the end of a run, into folders beside each other."""

    def __init__(self, ctx: Context, model: Model, folder: Path) -> None:
        self._ctx, self._model, self._folder = ctx, model, folder.absolute()
        if ctx.runtime.rank == 0:
            ctx.exit.callback(self._clear)

    def __call__(self, label: str, _expected: Sequence[float], ready: Path | None) -> Folder:
        """The folder of a label; the first rank writes."""
        if ready is not None:
            return Folder(ready)
        folder = self._folder / f"pegbox-part-{label}"
        runtime, model = self._ctx.runtime, self._model
        if runtime.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        runtime.barrier()
        request = ExportRequest(folder=folder, format=model.adapter or model.format)
        self._ctx.call(hooks.export_model, self._ctx, model, request)
        runtime.barrier()
        return Folder(folder, temporary=True)

    def _clear(self) -> None:
        for folder in self._folder.glob("pegbox-*"):
            shutil.rmtree(folder, ignore_errors=True)


class Live:
    """The trainer's tensors themselves, as long as nobody has written into them since it was made."""

    def __init__(self, weights: LiveWeights, expected: Sequence[float]) -> None:
        self._weights, self._stamp = weights, weights.stamp()
        self._digest = hashlib.sha256(repr(tuple(expected)).encode()).hexdigest()

    def seal(self, label: str) -> str:
        """Named after the trainer's log-probabilities of the probes: a digest of all bytes would take longer than
        sending them."""
        return f"pegbox-{self._digest[:8]}-{label}"

    @property
    def weights(self) -> LiveWeights:
        """What it holds.

        Raises:
            RunError: the run has learnt since.
        """
        if self._weights.stamp() != self._stamp:
            raise RunError(
                "vLLM has lost its weights, and the trainer holds newer ones by now",
                "They are sent from the trainer's memory, where the older ones no longer are.",
                "Set rollout-vllm.transfer to disk, or go on from the last checkpoint with resume=auto.",
            )
        return self._weights

    def tensors(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext(self.weights)

    def discard(self) -> None:
        """Nothing was stored."""
