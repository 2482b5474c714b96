"""An estimate as text: a table by plugin, what runs out, and what would fit."""

from __future__ import annotations

from pegbox_memory.estimate import GIB, Estimate


def text(made: Estimate) -> str:
    """The report that the command prints."""
    title = (
        f"{made.model}: micro-batches of {made.micro_batch} x {made.tokens:,} tokens in {made.precision}; "
        f"the peak is in the {made.during}"
    )
    rows = [(row.what, row.plugin, _gib(row.bytes)) for row in made.rows]
    sums = [("allocated", "", _gib(made.allocated))]
    if made.context:
        share = made.reserved / made.allocated - 1
        sums += [
            (f"reserved: {share:.0%} more, for what fragments", "", _gib(made.reserved)),
            ("process: with the context of the device", "", _gib(made.process)),
        ]
    lines = [title, "", *_table([("in memory at the peak", "plugin", "GiB"), *rows, *sums])]
    if made.recomputed is not None:
        lines += ["", f"{made.recomputed} of {made.layers} layers are computed again: as many as memory asks for."]
    lines += ["", *_verdict(made), *(f"Note: {note}." for note in made.notes)]
    return "\n".join(lines)


def _verdict(made: Estimate) -> list[str]:
    if made.device is None:
        return ["No device is known here; --device-gib 80 says whether it fits, and the largest micro-batch that does."]
    fits = "fits" if made.fits else "DOES NOT FIT"
    lines = [f"{fits} a device of {_gib(made.device)} GiB."]
    if made.largest_micro_batch is None and made.during.startswith("sampling"):
        lines.append("Not even one row fits: sample fewer completions at once (rollout-hf.batch), or shorter ones.")
    elif made.largest_micro_batch is None:
        lines.append("Not even one row fits: shorten rows, recompute (plugin activations), or quantize.")
    else:
        lines.append(f"The largest micro-batch that fits: {made.largest_micro_batch}.")
    return lines


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [f"{what:<{widths[0]}}  {plugin:<{widths[1]}}  {size:>{widths[2]}}" for what, plugin, size in rows]
