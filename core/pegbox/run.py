"""The story of a run, in hook order. Each line asks one owner, or collects what several plugins say."""

from __future__ import annotations

from pegbox import hooks
from pegbox.assembly import model_request, prepare_model
from pegbox.context import Context
from pegbox.errors import fail
from pegbox.events import RunBegins, RunEnded, RunFailed
from pegbox.folder import claim, resume_point
from pegbox.merging import merge_groups
from pegbox.plan import require_training
from pegbox.types import ExportRequest, Job, Outcome


def execute(ctx: Context) -> Outcome:
    """Run everything that the plan says; the outcome of the training, or the error that stopped it."""
    require_training(ctx)
    with ctx.exit:
        try:
            return _story(ctx)
        except BaseException as error:
            try:
                ctx.notify(RunFailed(error=error))
            except Exception as second:
                error.add_note(f"an observer failed as well: {second!r}")
            raise


def _story(ctx: Context) -> Outcome:
    ctx.notify(RunBegins())
    claim(ctx.folder, ctx.config.run.resume)
    ctx.processor = ctx.call(hooks.load_processor, ctx)
    train = ctx.call(hooks.build_dataset, ctx, ctx.processor, "train")
    if train is None:
        raise fail("no-train-data", owner=ctx.kernel.owners("build_dataset")[""])
    held_out = ctx.call(hooks.build_dataset, ctx, ctx.processor, "eval")

    ctx.runtime = ctx.call(hooks.build_runtime, ctx)
    ctx.plan.agree(ctx.runtime)

    model = prepare_model(ctx, model_request(ctx))
    loss = ctx.call(hooks.build_loss, ctx, model)
    batches = ctx.call(hooks.build_batches, ctx, model, train)
    evals = ctx.call(hooks.build_batches, ctx, model, held_out) if held_out is not None else None
    ctx.total_steps = batches.total_steps

    groups = merge_groups(model, ctx.each(hooks.configure_groups, ctx, model))
    steps = ctx.call(hooks.build_optimizer, ctx, model, groups)
    store = ctx.call(hooks.open_checkpoints, ctx)
    resume = resume_point(store, ctx.config.run.resume)
    job = Job(model=model, loss=loss, train=batches, eval=evals, optimization=steps, checkpoints=store, resume=resume)
    outcome = ctx.call(hooks.run_training, ctx, job)

    if outcome.reason != "interrupted":
        ctx.call(hooks.export_model, ctx, model, ExportRequest(folder=ctx.folder, format=model.adapter or model.format))
    ctx.notify(RunEnded(outcome=outcome, folder=ctx.folder))
    return outcome
