"""Tiny random models, one for each way in which weights are stored."""

from __future__ import annotations

from collections.abc import Callable

from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 260
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def _llama(**changes: object) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "tied": lambda: _llama(tie_word_embeddings=True),
    "biased": lambda: _llama(attention_bias=True),
    "wide": lambda: _llama(hidden_size=1024, intermediate_size=2048, num_hidden_layers=6),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=256, initializer_range=0.2)
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16)
    ),
    "wide-moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **{**SHAPE, "hidden_size": 512, "num_hidden_layers": 6},
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=1024,
            head_dim=16,
        )
    ),
    "llava": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            ),
            text_config=LlamaConfig(**SHAPE),
            image_token_index=259,
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)),
}
