"""The weights inside a GGUF file, under transformers' names.

For the architectures of `UNDO` the tensors are unpacked one by one with the `gguf` package, renamed by its table of
names, and brought back from what llama.cpp's converter did to them; nothing but the result is held in memory. Every
parameter of the model must be found, with its shape. Other architectures go through transformers' own loader, which
knows more of them and takes longer (it builds the table of names once for every module).

Source: llama.cpp's `convert_hf_to_gguf.py`, which says what was done to the tensors of each architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pegbox.errors import UserError

from pegbox_hf.gguf_file import GgufFile, write_slim

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype
    from transformers import PretrainedConfig

    Undo = Callable[[str, np.ndarray, PretrainedConfig], np.ndarray]

ROW_BLOCKS = 256
"""Blocks unpacked at a time, at most; tensors are cut evenly."""
FLOATS = ("F32", "F16", "BF16")
READ_FAST_BY_TRANSFORMERS = ("qwen35",)
"""Architectures whose config transformers reads with its own fast reader, from the length of the vocabulary."""


def _as_stored(_name: str, values: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    return values


def _unpermute(name: str, values: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """The rows of query and key heads: llama.cpp interleaves the two halves that rotate together."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def _norm_minus_one(name: str, values: np.ndarray, _config: PretrainedConfig) -> np.ndarray:
    """Gemma's norms scale by 1 + weight; llama.cpp stores the sum."""
    return values - 1 if name.endswith("norm.weight") else values


UNDO: dict[str, Undo] = {
    "llama": _unpermute,
    "qwen2": _as_stored,
    "qwen3": _as_stored,
    "gemma2": _norm_minus_one,
    "gemma3": _norm_minus_one,
}


def read_config(header: GgufFile) -> PretrainedConfig:
    """The transformers config of a GGUF file; no weights are read.

    Raises:
        UserError: transformers does not know the architecture, or would lose how the file scales positions.
    """
    from transformers import AutoConfig

    _refuse_lost_scaling(header)
    try:
        if header.architecture in READ_FAST_BY_TRANSFORMERS:
            config = AutoConfig.from_pretrained(header.path.parent, gguf_file=header.path.name)
        else:
            with TemporaryDirectory() as folder:
                write_slim(header, Path(folder) / "slim.gguf")
                config = AutoConfig.from_pretrained(folder, gguf_file="slim.gguf")
    except ValueError as error:
        raise UserError(
            f"{header.path} holds a model of architecture '{header.architecture}': {error}",
            "transformers says which GGUF files it can convert.",
            "Use the original safetensors model.",
        ) from error
    if "token_embd.weight" in header.tensors:
        config.vocab_size = header.tensors["token_embd.weight"].shape[0]
    head_dim = header.get(f"{header.architecture}.attention.key_length")
    if head_dim is not None and hasattr(config, "head_dim"):
        config.head_dim = head_dim
    config.__dict__.pop("_model_name_or_path", None)
    return config


def _refuse_lost_scaling(header: GgufFile) -> None:
    scaling = header.get(f"{header.architecture}.rope.scaling.type")
    if header.architecture in UNDO and ("rope_freqs.weight" in header.tensors or scaling not in (None, "none")):
        raise UserError(
            f"{header.path} scales its rotary positions ({scaling or 'rope_freqs.weight'})",
            "transformers does not read this from a GGUF file: the converted model would be another one.",
            "Use the original safetensors model.",
        )


def read_weights(header: GgufFile, config: PretrainedConfig) -> dict[str, Tensor]:
    """Every parameter by its name in transformers, in the dtype that `storage_dtype` says.

    Raises:
        UserError: a parameter of the model is missing in the file, or has another shape.
    """
    if header.architecture not in UNDO:
        return _read_by_transformers(header)
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        expected = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    target = storage_dtype(header)
    renamed = _names(header, config, expected)
    weights = {
        renamed[name]: torch.from_numpy(values.copy()).to(target)
        for name, values in _unpacked(header, renamed)
        for values in [UNDO[header.architecture](name, values, config)]
    }
    wrong = [name for name, shape in expected.items() if name not in weights or weights[name].shape != shape]
    if wrong:
        raise UserError(
            f"{header.path} lacks {len(wrong)} of {len(expected)} parameters (or has other shapes): {wrong[0]}",
            f"The file says it holds a model of architecture '{header.architecture}'.",
            "Use the original safetensors model.",
        )
    return weights


def storage_dtype(header: GgufFile) -> dtype:
    """bfloat16 for quantized files; a file that holds plain floats keeps the narrowest of them."""
    import torch
    from gguf import GGMLQuantizationType

    kinds = {GGMLQuantizationType(tensor.kind).name for tensor in header.tensors.values()}
    if not kinds <= set(FLOATS) or "BF16" in kinds:
        return torch.bfloat16
    return torch.float16 if "F16" in kinds else torch.float32


def _names(header: GgufFile, config: PretrainedConfig, expected: dict[str, object]) -> dict[str, str]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    table = get_tensor_name_map(architecture, config.num_hidden_layers)
    found = {}
    for name in expected:
        stem, _, kind = name.rpartition(".")
        stored = table.get_name(stem)
        if stored is not None:
            found[f"{stored}.{kind}"] = name
    return found


def _unpacked(header: GgufFile, wanted: Container[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The wanted tensors as float32, one at a time, in the order of the file."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    data = np.memmap(header.path, mode="r")
    for name, tensor in header.tensors.items():
        if name not in wanted:
            continue
        kind = GGMLQuantizationType(tensor.kind)
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        start, blocks = header.data + tensor.offset, math.prod(tensor.shape) // block_values
        row_bytes = math.gcd(blocks, ROW_BLOCKS) * block_bytes
        packed = np.asarray(data[start : start + blocks * block_bytes]).reshape(-1, row_bytes)
        yield name, dequantize(packed, kind).reshape(tensor.shape)


def _read_by_transformers(header: GgufFile) -> dict[str, Tensor]:
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        header.path.parent,
        gguf_file=header.path.name,
        dtype=storage_dtype(header),
        quantization_config=GgufConfig(gguf_file=header.path.name, dequantize=True),
    )
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
