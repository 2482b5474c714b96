"""Which of the ways to a reference a run takes, and the models it needs for that.

The policy's own start is had in three ways: its adapter switched off (nothing is copied, but each step runs the policy
twice), a frozen copy (the memory of a second model), or one pass before training whose result is read back (no second
forward in training; the policy itself computes it, before its first step).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from pegbox.assembly import model_request
from pegbox.errors import ConfigError, UserError
from pegbox.rows import ExampleStream

from pegbox_reference.batches import beside
from pegbox_reference.computed import Computed
from pegbox_reference.config import MERGES, ReferenceConfig
from pegbox_reference.syncing import SyncedReference

if TYPE_CHECKING:
    from pegbox.context import Context
    from pegbox.rows import BatchSource, Dataset
    from pegbox.types import Model

    from pegbox_reference.batches import ReferencedBatches

NATS_APART = 0.05
"""Mean difference of a token's log-probability that rounding does not explain."""


class Reference:
    """The reference of one run.

    Raises:
        ConfigError: the adapter cannot be switched off as the config asks.
    """

    def __init__(self, ctx: Context, policy: Model) -> None:
        self._ctx, self._policy, self._config = ctx, policy, ctx.section(ReferenceConfig)
        self._synced: SyncedReference | None = None
        self._computed: Computed | None = None
        self.how = self._choose()

    def _choose(self) -> str:
        config, policy = self._config, self._policy
        switch = policy.without_adapter is not None and MERGES not in self._ctx.kernel.active
        if config.how == "adapter" and not switch:
            raise ConfigError(
                f"reference.how is adapter, and the adapter on {policy.name} cannot be switched off",
                "It continues an earlier one, or its initialisation took its part out of the weights under it.",
                "Set reference.how to precomputed or copy.",
            )
        if config.how != "auto":
            return config.how
        as_it_is = config.model is None and config.dtype == "policy"
        return "adapter" if switch and as_it_is else "copy"

    def beside(self, source: BatchSource, dataset: Dataset) -> ReferencedBatches:
        """The source with the reference's log-probabilities."""
        if self.how == "precomputed":
            from pegbox_reference.precomputing import precomputed

            assert not isinstance(dataset, ExampleStream), "it was refused when the rows were made"
            logps = precomputed(self._ctx, source, dataset, self._before_training())
            if dataset.split == "train":
                self._say(f"log-probabilities of {self._named()}, read from {logps.folder}")
            return beside(source, logps)
        if self._computed is None:
            self._computed = self._open_computed()
            self._require_start(source, dataset)
        return beside(source, self._computed)

    def started(self) -> None:
        """Training begins: a second model that has computed everything is let go."""
        if self.how == "precomputed" and self._computed is not None:
            if self._computed.model is not self._policy:
                self._ctx.kernel.patches.undo(self._computed.model)
            self._computed = None

    def stepped(self, step: int) -> None:
        """The policy made a step: move the reference towards it, where that is due."""
        if self._synced is not None and step % (self._config.sync_every or 1) == 0:
            self._synced.move()

    def _open_computed(self) -> Computed:
        if self.how == "adapter":
            assert self._policy.without_adapter is not None, "it was chosen because it is there"
            self._say(f"{self._policy.name} with its adapter switched off")
            return Computed(self._policy, self._ctx.runtime, self._policy.without_adapter)
        model = self._open()
        every = self._config.sync_every
        if every is not None:
            self._synced = SyncedReference(self._policy, model, self._config.mixup)
            self._ctx.register_state("reference/synced", self._synced)
        moves = "" if every is None else f", moved by {self._config.mixup} towards the policy every {every} steps"
        self._say(f"a frozen copy of {self._named()}{moves}")
        return Computed(model, self._ctx.runtime)

    def _before_training(self) -> Computed:
        """What computes the whole data: the policy, which has made no step yet, or another model."""
        if self._computed is None:
            own = self._config.model is None
            switch = self._policy.without_adapter if own else None
            self._computed = Computed(self._policy if own else self._open(), self._ctx.runtime, switch)
        return self._computed

    def _open(self) -> Model:
        config, request = self._config, model_request(self._ctx)
        if config.model is not None:
            request = replace(request, name=config.model, revision=config.revision)
        dtype: str = config.dtype
        if dtype == "policy" and self._policy.adapter is None:
            dtype = str(next(self._policy.module.parameters()).dtype).removeprefix("torch.")
        if dtype != "policy":
            request = replace(request, options=replace(request.options, dtype=dtype))
        try:
            return self._ctx.open_model("reference", request)
        except UserError as error:
            if config.model is None:
                raise
            raise ConfigError(
                f"reference.model is '{config.model}': {error.what}", error.why, "Correct reference.model."
            ) from error

    def _require_start(self, source: BatchSource, dataset: Dataset) -> None:
        """Raise unless a copy that nobody chose is the policy's start: the policy has made no step yet.

        An adapter that continues an earlier one is part of the policy's start, and of no model by its name.
        """
        lay_out = getattr(source, "lay_out", None)
        if self.how != "copy" or self._config.model is not None or lay_out is None:
            return
        if isinstance(dataset, ExampleStream) or not len(dataset):
            return
        assert self._computed is not None, "it was opened"
        batches = lay_out([dataset[0]])
        pairs = zip(self._computed(batches), Computed(self._policy, self._ctx.runtime)(batches), strict=True)
        apart = [torch.stack([(a - b).abs().sum(), a.new_tensor(len(a))]) for a, b in pairs]
        total, tokens = self._ctx.runtime.sum(torch.stack(apart).sum(0)).tolist()
        if total > NATS_APART * tokens:
            raise ConfigError(
                f"a copy of {self._policy.name} is not what the policy starts from: the log-probability of a token "
                f"differs by {total / tokens:.2f} nats on average",
                "An adapter that is continued, or that was made from quantized weights, is part of the start.",
                "Set reference.how to precomputed, or name the reference in reference.model.",
            )

    def _named(self) -> str:
        return self._config.model or f"{self._policy.name} as it starts"

    def _say(self, what: str) -> None:
        if self._ctx.runtime.rank == 0:
            self._ctx.log.info("reference: %s", what)
