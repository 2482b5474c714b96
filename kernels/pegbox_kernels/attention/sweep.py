"""Launches around the default, for `bench --sweep`: forward by itself, each way backward as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from pegbox_kernels.attention import launch as kernels
from pegbox_kernels.attention.launch import Launch, Saved, Shape, Tile
from pegbox_kernels.attention.window import Walk, fits
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
    for tile in _forward(shape):
        changed = replace(default, forward=tile)
        found[f"forward {_name(tile)}"] = partial(kernels.forward, q, k, v, sinks, table, shape, changed)
    for launch in _backward(shape, default):
        found[f"backward {_of(launch)}"] = partial(kernels.backward, saved, shape, launch)
    return found


def _forward(shape: Shape) -> Iterator[Tile]:
    if shape.window is None:
        sizes = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 64, 4), (64, 128, 4), (128, 32, 4))
        yield from (Tile(tokens, 1, keys, warps, stages) for tokens, keys, warps in sizes for stages in (2, 3))
        return
    for heads in {1, shape.packed(2), shape.packed(8)}:
        for rows, warps in ((64, 4), (128, 4), (128, 8)):
            for keys in (32, 64):
                for masked in (False, True):
                    yield Tile(rows // heads, heads, keys, warps, 2, masked)


def _backward(shape: Shape, default: Launch) -> Iterator[Launch]:
    if fits(shape.window, shape.width, shape.dtype.itemsize):
        for chunk in (128, 256):
            for heads, warps in ((1, 4), (1, 8), (shape.packed(2), 8), (shape.packed(4), 16)):
                for stages in (1, 2) if warps <= 8 else (1,):
                    yield replace(default, way="window", window=Walk(chunk, heads, warps, stages))
    masked = shape.window is not None and shape.window <= 512
    keys = (
        Tile(64, 1, 128, 8, 2, masked),
        Tile(32, 1, 128, 8, 2, masked),
        Tile(64, 1, 64, 4, 1, masked),
        Tile(64, 1, 64, 4, 2, masked),
        Tile(64, 1, 64, 4, 2, masked, True),
        Tile(128, 1, 64, 8, 2, masked, True),
        Tile(128, 1, 128, 8, 2, masked, True),
    )
    for tile in keys:
        for way in ("atomic", "ordered"):
            yield replace(default, way=way, keys=tile)
    for rows, count, warps, stages in (
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 2),
        (128, 32, 4, 2),
    ):
        yield replace(default, way="ordered", queries=Tile(rows, 1, count, warps, stages, masked))


def _of(launch: Launch) -> str:
    if launch.way == "window":
        walk = launch.window
        return f"window, chunk {walk.chunk}, {walk.heads} heads, {walk.warps} warps, {walk.stages} stages"
    queries = f", queries {_name(launch.queries)}" if launch.way == "ordered" else ""
    return f"{launch.way}, keys {_name(launch.keys)}{queries}"


def _name(tile: Tile) -> str:
    flags = " masked" * tile.masked + " straight" * tile.straight
    return f"{tile.tokens}x{tile.heads}x{tile.keys} {tile.warps} warps {tile.stages} stages{flags}"
