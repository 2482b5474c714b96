"""Length, batches, precision of the forward, resuming, the order of rows."""

from __future__ import annotations

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps import online
from pegbox_convert.steps.methods import ONLINE
from pegbox_convert.values import flag, quiet


def length(c: Conversion) -> None:
    """Epochs, or steps where they are set."""
    steps = c.get("max_steps", "positive_whole")
    if steps:
        c.put("trainer.max_steps", steps, "max_steps")
        if c.has("num_train_epochs"):
            c.unneeded("num_train_epochs", "max_steps decides, there too")
    else:
        epochs = c.get("num_train_epochs", "decimal")
        c.put("trainer.epochs", float(epochs), "num_train_epochs")


def batch(c: Conversion) -> None:
    """Rows of a micro-batch and micro-batches of a step, per process; any two of micro, accumulation, product."""
    micro, steps = c.get("per_device_train_batch_size", "whole"), c.get("gradient_accumulation_steps", "whole")
    product, by = c.get("batch_size", "whole"), ["gradient_accumulation_steps"]
    if product and c.has("per_device_train_batch_size"):
        steps, by = product // micro, ["batch_size", *by]
    elif product and c.has("gradient_accumulation_steps"):
        micro = product // steps
    if c.method in ONLINE:
        online.batch(c, micro, steps)
    else:
        c.put("trainer.accumulation", steps, *by)
        c.put("trainer.micro_batch", micro, "per_device_train_batch_size", *(("batch_size",) if product else ()))
    rows = c.get("per_device_eval_batch_size", "whole")
    if rows and (c.has("per_device_eval_batch_size") or (evaluates(c) and rows != micro)):
        c.put("trainer.eval_micro_batch", rows, "per_device_eval_batch_size")


def evaluates(c: Conversion) -> bool:
    """Whether the new config has rows to evaluate on."""
    data = c.draft.get("data", {})
    return any(key in data for key in ("eval", "eval_fraction", "eval_rows"))


def resume(c: Conversion) -> None:
    """From the latest checkpoint, or from a named one."""
    value = c.get("resume_from_checkpoint")
    automatic = c.get("auto_resume") if c.has("auto_resume") else None
    if c.has("resume_from_checkpoint") and not quiet(value):
        latest = value is True or str(value).lower() in ("true", "auto", "latest")
        note = "" if latest else "checkpoints of other programs cannot be read: only one of a Pegbox run can be resumed"
        if latest:
            c.put("resume", "auto", "resume_from_checkpoint")
        else:
            c.later("resume_from_checkpoint", note)
    elif c.has("auto_resume") and not quiet(automatic):
        c.put("resume", "auto", "auto_resume")


def precision(c: Conversion) -> None:
    """What the forward computes in, and the data types of frozen and of trained weights."""
    half, brain = c.get("fp16"), c.get("bf16")
    if half is not None and flag(half):
        c.put("trainer.precision", "fp16", "fp16")
    elif brain is None:
        c.put("trainer.precision", str(c.table.facts["precision"]), "bf16")
    elif str(brain).lower() == "auto":
        c.put("trainer.precision", "auto", "bf16", note="bf16 where the device has it, else fp32")
    else:
        on = str(brain).lower() == "full" or flag(brain)
        c.put("trainer.precision", "bf16" if on else "fp32", "bf16")
    _weights(c)


def _weights(c: Conversion) -> None:
    """In which data type weights are loaded: frozen ones as the program does, trained ones too."""
    given = c.get("dtype", "dtype")
    chosen = given or {"fp16": "float16", "fp32": "float32"}.get(str(c.written("trainer.precision")), "bfloat16")
    source = ("dtype",) if given else ("fp16",) if c.get("fp16") else ("bf16",)
    if "lora" in c.plugins:
        c.put("model.dtype", chosen, *source)
    elif c.table.facts.get("trains_in_fp32"):
        c.put("hf.trainable_dtype", "float32", *source)
    elif chosen == "auto":
        c.put(
            "hf.trainable_dtype", "float32", *source, note="trained in fp32, not in the checkpoint's type", differs=True
        )
    elif chosen == "float16":
        c.put("hf.trainable_dtype", "float32", *source, note="fp16 weights cannot be trained; fp32 is", differs=True)
    else:
        c.put("hf.trainable_dtype", chosen, *source)


def order(c: Conversion) -> None:
    """In which order rows are taken, what is logged, and on which device."""
    strategy = str(c.get("train_sampling_strategy") or "random")
    if strategy in ("random", "sequential"):
        c.put("trainer.shuffle", strategy == "random", "train_sampling_strategy")
    else:
        c.later("train_sampling_strategy", "rows of similar length in one batch")
    if c.get("disable_shuffling") is not None:
        c.put("trainer.shuffle", not flag(c.get("disable_shuffling")), "disable_shuffling")
    if c.get("shuffle_dataset") is not None and flag(c.get("shuffle_dataset")):
        c.put("trainer.shuffle" if c.method in ONLINE else "data.shuffle", True, "shuffle_dataset")
    elif c.method in ONLINE and c.has("shuffle_dataset"):
        c.put("trainer.shuffle", False, "shuffle_dataset")
    logging = str(c.get("logging_strategy") or "steps")
    if logging != "steps":
        c.later("logging_strategy", f"logging by {logging}: figures are written every trainer.log_every steps")
    if c.get("use_cpu") is not None and flag(c.get("use_cpu")):
        c.put("trainer.device", "cpu", "use_cpu")
