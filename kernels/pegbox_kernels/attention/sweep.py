"""Launches around the default, for `bench --sweep`: forward by itself, each way backward as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from pegbox_kernels.attention import launch as kernels
from pegbox_kernels.attention.launch import Launch, Saved, Shape, Short, Tile
from pegbox_kernels.attention.window_backward import Columns
from pegbox_kernels.attention.window_forward import Rows
from pegbox_kernels.harness.opspec import Inputs


def variants(inputs: Inputs) -> Mapping[str, Callable[[], object]]:
    """By name, for a GPU: the inputs of a workload, with gradients of random outputs."""
    q, k, v, borders = (inputs[name] for name in ("q_THD", "k_TKD", "v_TKD", "cu_seqlens_S"))
    shape = Shape(
        tokens=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype,
        scale=inputs["scale"],
        causal=inputs["causal"],
        window=inputs["window"],
    )
    sinks = inputs["sinks_H"] if inputs["sinks_H"] is not None else inputs["frozen_sinks_H"]
    table = None if borders is None else kernels.make_table(borders, shape.tokens)
    default = kernels.default_launch(shape, False)
    out, lse = kernels.forward(q, k, v, sinks, table, shape, default)
    dout = torch.randn_like(out)
    saved = Saved(q=q, k=k, v=v, sinks=sinks, out=out, lse=lse, dout=dout, dlse=None, table=table)
    found: dict[str, Callable[[], object]] = {}
    for launch in _forward(shape, default):
        found[f"forward {_of(launch, True)}"] = partial(kernels.forward, q, k, v, sinks, table, shape, launch)
    for launch in _backward(shape, default):
        found[f"backward {_of(launch, False)}"] = partial(kernels.backward, saved, shape, launch)
    return found


ROWS = (Rows(32, 2, 4, 4, 2), Rows(32, 2, 4, 4, 1, 128), Rows(16, 4, 2, 4, 2, 128), Rows(16, 4, 1, 4, 1))
COLUMNS = (Columns(64, 64, 4, 3), Columns(64, 64, 4, 2), Columns(64, 64, 4, 3, 168), Columns(64, 32, 4, 3))


def _forward(shape: Shape, default: Launch) -> Iterator[Launch]:
    if default.short is not None:
        for rows in ROWS:
            yield replace(default, short=default.short._replace(forward=rows.fitted(shape)))
    if default.crew is not None:
        yield default
    plain = replace(default, short=None, crew=None)
    if shape.window is None:
        sizes = ((128, 128, 8), (128, 64, 8), (64, 64, 4), (64, 128, 4))
        for tokens, keys, warps in sizes:
            for stages in (2, 3):
                yield replace(plain, forward=Tile(tokens, 1, keys, warps, stages))
        return
    for heads in {1, shape.packed(2)}:
        for rows, warps in ((64, 4), (128, 8)):
            for masked in (False, True):
                yield replace(plain, forward=Tile(rows // heads, heads, 64, warps, 2, masked))


def _backward(shape: Shape, default: Launch) -> Iterator[Launch]:
    if default.short is not None:
        for rows in ROWS:
            yield replace(default, short=Short(ROWS[0], rows.fitted(shape), COLUMNS[0]))
        for columns in COLUMNS[1:]:
            yield replace(default, short=Short(ROWS[0], ROWS[0].fitted(shape), columns))
    if default.gather is not None:
        yield default
    plain, masked = replace(default, short=None, gather=None), shape.short
    for tokens, keys, warps, stages in ((64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3)):
        for way in ("atomic", "ordered"):
            yield replace(plain, way=way, keys=Tile(tokens, 1, keys, warps, stages, masked))
    yield replace(plain, way="ordered", keys=Tile(64, 1, 64, 4, 2, masked, True))
    for tokens, keys, warps, stages in ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)):
        yield replace(plain, way="ordered", queries=Tile(tokens, 1, keys, warps, stages, masked))


def _of(launch: Launch, forward: bool) -> str:
    if launch.short is not None:
        _, rows, columns = launch.short
        return f"short {_fields(launch.short.forward) if forward else f'{_fields(rows)}; {_fields(columns)}'}"
    if forward:
        return _name(launch.forward) if launch.crew is None else f"crew {_fields(launch.crew)}"
    if launch.gather is not None:
        return f"gather {_fields(launch.gather)}"
    queries = f", queries {_name(launch.queries)}" if launch.way == "ordered" else ""
    return f"{launch.way}, keys {_name(launch.keys)}{queries}"


def _fields(launch: tuple[object, ...]) -> str:
    return " ".join(str(value) for value in launch)


def _name(tile: Tile) -> str:
    flags = " masked" * tile.masked + " straight" * tile.straight
    return f"{tile.tokens}x{tile.heads}x{tile.keys} {tile.warps} warps {tile.stages} stages{flags}"
