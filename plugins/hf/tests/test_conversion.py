"""GGUF files written here, as llama.cpp writes them, and converted back: the model must be the one that was written."""

from __future__ import annotations

import json
import multiprocessing
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from pegbox.errors import UserError
from pegbox_hf import gguf_file
from pegbox_hf.conversion import converted, place
from pegbox_hf.gguf_tokenizer import build
from pegbox_hf.gguf_weights import read_config, read_weights
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = {"Llama": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3", "Gemma2": "gemma2"}
CONTROL, NORMAL = 3, 1
Make = Callable[..., PreTrainedModel]
Kind = gguf.GGMLQuantizationType


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key projections of a Llama."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def stored(name: str, values: np.ndarray, model: PreTrainedModel, architecture: str) -> np.ndarray:
    if architecture == "llama" and "attn_q." in name:
        return permuted(values, model.config.num_attention_heads)
    if architecture == "llama" and "attn_k." in name:
        return permuted(values, model.config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: Kind = Kind.F32,
    architecture: str = "llama",
    pre: str = "smollm",
) -> Path:
    writer, config = gguf.GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    add_vocabulary(writer, tokenizer, config.vocab_size, pre)
    names = gguf.get_tensor_name_map(
        next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    for name, parameter in model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        target = f"{names.get_name(stem)}.{suffix}"
        values = stored(target, parameter.detach().float().numpy(), model, architecture)
        own = kind if values.ndim > 1 else Kind.F32
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(values), own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerFast, size: int, pre: str) -> None:
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    vocabulary += [f"[UNUSED{n}]" for n in range(size - len(vocabulary))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([CONTROL if token in tokenizer.all_special_tokens else NORMAL for token in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_converted_model_is_the_one_that_was_written(
    family: str, tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    changes = {"Gemma2": {"tie_word_embeddings": True, "sliding_window": 4}}.get(family, {})
    model = tiny(family, **changes)
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer, architecture=ARCHITECTURES[family])
    reopened = AutoModelForCausalLM.from_pretrained(converted(file, tmp_path / "cache"), dtype="auto")
    ids = torch.arange(3, 40)[None]
    assert reopened.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(reopened(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [Kind.Q8_0, Kind.Q4_0, Kind.F16, Kind.BF16])
def test_weights_equal_those_that_transformers_reads(
    kind: Kind, tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer, kind)
    header = gguf_file.read(file)
    ours = read_weights(header, read_config(header))
    dtype = torch.float16 if kind is Kind.F16 else torch.bfloat16
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(gguf_file=file.name, dequantize=True)
    )
    assert {tensor.dtype for tensor in ours.values()} == {dtype}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=0, atol=0, msg=name)


def test_other_architectures_go_through_transformers(
    tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny("StableLm", use_qkv_bias=False, use_parallel_residual=False)
    model.config.rms_norm_eps = model.config.layer_norm_eps
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, tokenizer, architecture="stablelm")
    header = gguf_file.read(file)
    assert read_config(header).model_type == "stablelm"
    weights = read_weights(header, read_config(header))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=0, msg=name)


def test_tokenizer_template_and_special_tokens_survive(
    tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = converted(write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer), tmp_path / "cache")
    reopened = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nNaïve wörds: 1234 capital ▁ . ,  don't\n\n日本 <|im_end|>"
    assert reopened(text).input_ids == tokenizer(text).input_ids
    assert reopened.decode(reopened(text).input_ids) == text
    assert (reopened.bos_token, reopened.eos_token, reopened.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")
    chat = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert reopened.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] == ids
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [tokenizer.eos_token_id]


def test_begin_token_is_added_if_the_file_says_so(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_vocabulary(writer, tokenizer, 320, "smollm")
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    ids = build(gguf_file.read(tmp_path / "t.gguf"))("Paris").input_ids
    assert ids == [tokenizer.bos_token_id, *tokenizer("Paris").input_ids]


def test_a_changed_file_is_converted_again_and_an_equal_one_is_not(
    tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    cache = tmp_path / "cache"
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer)
    first = converted(file, cache)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    copy = tmp_path / "elsewhere" / "tiny.gguf"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert converted(copy, cache) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    write_gguf(file, tiny("Llama", seed=1), tokenizer)
    assert converted(file, cache) != first


def test_processes_that_start_together_share_one_conversion(
    tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    cache = tmp_path / "cache"
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        folders = pool.starmap(converted, [(file, cache)] * 3)
    assert len(set(folders)) == 1
    assert [path.name for path in cache.glob("tiny-*")] == [folders[0].name]
    assert AutoModelForCausalLM.from_pretrained(folders[0]).config.model_type == "llama"


def test_an_unfinished_conversion_is_never_used(tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    cache = tmp_path / "cache"
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer)
    unfinished = cache / f".{place(file, cache).name}.new"
    unfinished.mkdir(parents=True)
    (unfinished / "model.safetensors").write_bytes(b"half")
    assert AutoModelForCausalLM.from_pretrained(converted(file, cache)).config.model_type == "llama"
    assert not unfinished.exists()


def test_a_file_that_scales_positions_is_refused(
    tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny("Llama")
    model.rope_freqs = torch.nn.Module()
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_vocabulary(writer, tokenizer, 320, "llama-bpe")
    writer.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="scales its rotary positions"):
        converted(tmp_path / "t.gguf", tmp_path / "cache")


def test_a_missing_tensor_is_named(tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny("Llama")
    del model.model.layers[1].mlp.up_proj
    file = write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    with pytest.raises(UserError, match=r"lacks 1 of 21 parameters.*layers\.1\.mlp\.up_proj"):
        converted(file, tmp_path / "cache")


def test_an_unknown_way_of_splitting_is_refused(tmp_path: Path, tiny: Make, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny("Llama"), tokenizer, pre="qwen3")
    with pytest.raises(UserError, match="'qwen3', which is not known") as raised:
        build(gguf_file.read(file))
    assert "qwen2" in raised.value.why
    assert "hf.tokenizer" in raised.value.next


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as a GGUF file"),
        (b"PK\x03\x04 this is a zip file, is it not?", "does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 9), "cannot be read as a GGUF file"),
    ],
)
def test_a_file_that_is_not_gguf_is_refused(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(UserError, match=says):
        gguf_file.read(tmp_path / "broken.gguf")


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m-00001-of-00003.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="one of 3 parts"):
        gguf_file.read(tmp_path / "m-00001-of-00003.gguf")
