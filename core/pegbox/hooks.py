"""Every hook of the engine, in the order of a run. This file is the contract of record.

The verb of a hook tells its semantics, so that nobody has to look them up:

| verb | meaning |
|---|---|
| `register_` | pure declarations, collected before the config is final; a duplicate name is an error |
| `configure_` | records, merged field by field; two values for one field are an error |
| `load_ build_ apply_ place_ run_ generate_ open_ export_` | one owner makes the object; wrappers refine the result |
| `patch_` | declarative patch records; the kernel applies them, checks collisions, can undo them |
| `score_ sync_` | fan-out: all run, each result keeps its plugin's name |
| `on_` | observers; an exception stops the run unless the plugin declares `best_effort = True` |

The order of the config's `plugins:` list is the call order: what is listed first touches a thing first. A hook
implementation may leave out arguments it does not need; it may not give them defaults. Only owners can be wrapped, with
`@hookimpl(wrapper=True)`: a generator that yields once, receives the owner's result and returns the refined one.
Wrappers never change arguments.

The idea of one annotated file of specifications follows pytest's `hookspec.py`; the mechanism is pluggy.
"""

# mypy: disable-error-code="empty-body"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from pathlib import Path

    from pegbox import rollouts as rl
    from pegbox import rows as r
    from pegbox import types as t
    from pegbox.context import Context
    from pegbox.events import Event, Signal

PROJECT = "pegbox"
hookimpl = HookimplMarker(PROJECT)

Stage = Literal["base", "adapted", "recompute", "compile"]

VERBS = {"register": "register", "configure": "configure", "patch": "patch", "on": "observe"}
VERBS.update(dict.fromkeys(("load", "build", "apply", "place", "run", "generate", "open", "export"), "own"))
VERBS.update(dict.fromkeys(("score", "sync"), "fan_out"))


def semantics(hook_name: str) -> str:
    """What the verb of a hook name means, e.g. `own` for `load_model`."""
    return VERBS[hook_name.split("_", 1)[0]]


def register_config() -> t.ConfigSection:
    """Declare the plugin's config section: one frozen pydantic model under the plugin's own key."""


def register_items() -> Sequence[t.Item]:
    """Declare named items of an open kind: format, source, template, optimizer, schedule, reward, health rule.

    Two active plugins that declare the same kind and name are an error. `load_model` and `export_model` have one
    owner per format: an owner of either declares the formats it handles as items of kind `model_format` or
    `export_format`.
    """


def load_processor(ctx: Context) -> t.Processor:
    """Load the tokenizer, and the image and audio parts where a model has them."""


def build_dataset(ctx: Context, processor: t.Processor, split: r.Split) -> r.Dataset | None:
    """Make the tokenized rows of one split, or None if the config names no data for it.

    Rows are made before there is a process group, so that no process waits in a collective for another that tokenizes:
    `ctx.runtime` is not there yet. Filtering, mixing and packing are wrappers: each receives the rows and returns its
    own view of them. A wrapper passes None on.
    """


def build_runtime(ctx: Context) -> t.Runtime:
    """Make the process group and choose the device. The kernel compares the plan's digest over all ranks next."""


def configure_model(ctx: Context) -> t.ModelOptions:
    """Say what the loaded model must be: quantization, dtype, attention, experts, parameters kept packed."""


def load_model(ctx: Context, request: t.ModelRequest) -> t.Model:
    """Load one model for one role. With `request.meta` build it on the meta device, reading no weights."""


def patch_attention(ctx: Context, model: t.Model) -> Sequence[t.ModulePatch]:
    """Return records that replace the attention computation of modules, through a named seam where one exists."""


def patch_modules(ctx: Context, model: t.Model, stage: Stage) -> Sequence[t.ModulePatch]:
    """Return patch records for one stage: base (as loaded), adapted (with adapters), recompute, compile."""


def apply_adapters(ctx: Context, model: t.Model) -> t.Model:
    """Add adapters to the policy and freeze the rest. Without an owner every parameter is trained."""


def place_model(ctx: Context, model: t.Model) -> t.Model:
    """Put the model on its device or devices. The owner's `Model.placement` owns full and sharded state."""


def build_loss(ctx: Context, model: t.Model) -> t.Loss:
    """Make the loss: terms with counts, computed from what the one forward of the loop returned."""


def build_batches(ctx: Context, model: t.Model, dataset: r.Dataset) -> r.BatchSource:
    """Make the batches of a split from its examples; for online methods, rollouts as batches."""


def configure_groups(ctx: Context, model: t.Model) -> Sequence[t.GroupOptions]:
    """Give parameters that match a pattern their own learning rate, weight decay, or tag."""


def build_optimizer(ctx: Context, model: t.Model, groups: Sequence[t.ParameterGroup]) -> t.Optimization:
    """Make the optimizer over the merged groups, and its learning-rate schedule."""


def open_checkpoints(ctx: Context) -> t.CheckpointStore:
    """Open the one atomic store that the loop and the placement share."""


def run_training(ctx: Context, job: t.Job) -> t.Outcome:
    """Run the training loop."""


def generate_rollouts(ctx: Context, request: rl.RolloutRequest) -> rl.RolloutBatch:
    """Sample completions, each with the first and last weight version it was sampled with."""


def score_rollouts(ctx: Context, rollouts: rl.RolloutBatch) -> Sequence[rl.Score]:
    """Score completions. All scorers run; each score keeps its own name.

    Asked about no completions, a scorer says its names all the same, `Score(name=..., values_R=())`: so a mistyped
    name is found before the first rollout.
    """


def sync_weights(ctx: Context, update: rl.WeightUpdate) -> rl.SyncReceipt:
    """Bring an engine to the new weights and return proof from the engine."""


def export_model(ctx: Context, model: t.Model, request: t.ExportRequest) -> Path:
    """Write the trained model, or its adapter, in one format that other programs open."""


def on_event(ctx: Context, event: Event) -> Signal | None:
    """Observe the run. May ask for STOP, SAVE or EVAL; events carry the model and the optimizer."""


SPECS: dict[str, Callable[..., object]] = {
    name: value for name, value in list(globals().items()) if name.split("_", 1)[0] in VERBS and callable(value)
}
"""Every hook specification by name, in the order of a run."""

for _name, _spec in SPECS.items():
    HookspecMarker(PROJECT)(_spec, firstresult=semantics(_name) == "own")
