"""Adapters, quantization, attention, recomputing, templates, tokens, compiling, placement."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.places import place
from pegbox_convert.values import dtype, flag, mapping, names, quiet, targets

ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "flex_attention": "flex_attention",
    "eager_attention": "eager",
    "xformers_attention": "",
    "sage_attention": "",
}
"""Axolotl's older switches, and what they are called today; empty: not here."""
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama-3",
    "gemma": "gemma",
    "gemma3": "gemma-3",
    "phi_3": "phi-3",
    "phi_35": "phi-3.5",
    "deepseek_v3": "deepseek-v3",
    "deepseek3": "deepseek-v3",
    "qwen_25": "qwen-2.5",
    "qwen": "qwen-2.5",
    "qwen3": "qwen-3",
    "mistral_v2v3": "mistral-v3",
    "mistral": "mistral-v3",
    "mistral_v3_tekken": "mistral-v3-tekken",
    "mistral_v7_tekken": "mistral-v7",
    "mistral_small": "mistral-v7",
    "cohere": "command-r",
    "aya": "command-r",
    "alpaca": "alpaca",
    "zephyr": "zephyr",
    "phi": "phi-3",
    "gpt": "harmony",
    "gpt_oss": "harmony",
}
"""Chat templates of Axolotl and LLaMA-Factory by name, and ours for the same models."""


def adapter(c: Conversion) -> None:
    """LoRA, QLoRA, or all parameters, by `adapter` (Axolotl), `use_peft` (TRL, Oumi) or `finetuning_type`."""
    kind = _kind(c)
    if kind in ("lora", "qlora"):
        c.start("lora")
        name = next((name for name in ("adapter", "use_peft", "finetuning_type") if c.has(name)), "finetuning_type")
        if c.has(name):
            c.put("lora.targets", c.written("lora.targets"), name)
        _targets(c)
    quantization(c, kind)


def _kind(c: Conversion) -> str:
    if c.has("adapter") and not quiet(c.get("adapter")):
        kind = str(c.get("adapter")).lower()
        if kind not in ("lora", "qlora"):
            c.later("adapter", f"the adapter {kind}")
        return kind
    if c.get("finetuning_type") is not None:
        kind = str(c.get("finetuning_type")).lower()
        if kind == "full":
            c.unneeded("finetuning_type", "without an adapter plugin all parameters are trained")
        elif kind != "lora":
            c.later("finetuning_type", f"the finetuning type {kind} (a part of the parameters: plugin freeze)")
        return kind
    if c.get("use_peft") is not None and flag(c.get("use_peft")):
        return "lora"
    for name in ("adapter", "use_peft"):
        if c.has(name):
            c.unneeded(name, "without an adapter plugin all parameters are trained")
    return "full"


def _targets(c: Conversion) -> None:
    modules, linear, experts = (
        c.get("lora_target_modules"),
        c.get("lora_target_linear"),
        c.get("lora_target_parameters"),
    )
    if linear is not None and flag(linear):
        given = ("lora_target_linear", *(("lora_target_modules",) if c.has("lora_target_modules") else ()))
        c.put("lora.targets", "all-linear", *given)
    elif not quiet(modules):
        c.put("lora.targets", targets(modules), "lora_target_modules")
    elif not quiet(experts):
        c.put("lora.targets", [], "lora_target_modules")
    elif "default_targets" in c.table.facts:
        note = "PEFT's choice for Llama, Qwen, Mistral and most others; check it if the model has other names"
        c.put("lora.targets", c.table.facts["default_targets"], "lora_target_modules", note=note)
    else:
        c.default_differs(
            "lora_target_modules", "neither modules nor all linear layers are named: ours adapts all linear layers"
        )
    if not quiet(experts):
        c.put("lora.parameters", names(experts), "lora_target_parameters")
    if not quiet(c.get("pissa_init")):
        c.put("lora.init", f"pissa_niter_{c.get('pissa_iter', 'whole')}", "pissa_init", "pissa_iter")
    if not quiet(c.get("loraplus_lr_ratio")):
        c.put("lora.lr_ratio", c.get("loraplus_lr_ratio", "decimal"), "loraplus_lr_ratio")
        c.put("lora.embedding_lr", c.get("loraplus_lr_embedding", "decimal") or 1e-6, "loraplus_lr_embedding")
    init = c.get("lora_init")
    if init is not None:
        known = {"true": "default", "default": "default", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
        word = str(init).lower()
        if word in known or word.startswith("pissa_niter_") or word == "orthogonal":
            c.put("lora.init", known.get(word, word), "lora_init")
        else:
            c.later("lora_init", f"the initialization {init}")


def quantization(c: Conversion, kind: str) -> None:
    """bitsandbytes in 4 or 8 bits, for the frozen base under an adapter."""
    four, eight, name4, name8 = _bits(c)
    if not (four or eight):
        return
    if kind not in ("lora", "qlora"):
        c.later(name4 if four else name8, "a quantized base is frozen: choose an adapter")
        return
    if "quantized_adapter_dtype" in c.table.facts:
        c.put("lora.dtype", c.table.facts["quantized_adapter_dtype"], name4 if four else name8)
    if eight:
        c.put("bnb.kind", "int8", name8)
        for name in ("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage", "bnb_4bit_compute_dtype"):
            if c.has(name):
                c.unneeded(name, "of 4 bits, and the base has 8")
        return
    c.start("bnb")
    c.put(
        "bnb.kind",
        str(c.get("bnb_4bit_quant_type") or "nf4"),
        "bnb_4bit_quant_type",
        *((name4,) if c.has(name4) else ()),
    )
    nested = c.get("use_bnb_nested_quant")
    if nested is not None:
        c.put("bnb.double_quant", flag(nested), "use_bnb_nested_quant")
    storage = c.get("bnb_4bit_quant_storage")
    if storage is not None:
        c.put("bnb.storage_dtype", str(storage), "bnb_4bit_quant_storage")
    compute = c.get("bnb_4bit_compute_dtype", "dtype") or c.get("dtype", "dtype")
    if compute in ("float32", "float16", "bfloat16"):
        c.put("bnb.compute_dtype", compute, "bnb_4bit_compute_dtype", "dtype")


def _bits(c: Conversion) -> tuple[bool, bool, str, str]:
    if c.has("quantization_bit"):
        bits = c.get("quantization_bit", "whole")
        if bits not in (4, 8):
            c.later("quantization_bit", f"{bits} bits")
        return bits == 4, bits == 8, "quantization_bit", "quantization_bit"
    if c.has("q_lora"):
        bits = c.get("q_lora_bits", "whole") if flag(c.get("q_lora")) else 0
        c.unneeded("q_lora_bits", "switched off") if not bits else None
        return bits == 4, bits == 8, "q_lora", "q_lora"
    four, eight = c.get("load_in_4bit"), c.get("load_in_8bit")
    return bool(four and flag(four)), bool(eight and flag(eight)), "load_in_4bit", "load_in_8bit"


def attention(c: Conversion) -> None:
    """The attention by its name in transformers; older switches too."""
    for switch, name in ATTENTION.items():
        if not c.has(switch):
            continue
        if not flag(c.get(switch)):
            c.unneeded(switch, "switched off; an older spelling of attn_implementation")
        elif name:
            c.put("hf.attention", name, switch, note="an older spelling of attn_implementation")
        else:
            c.later(switch, f"the attention {switch.removesuffix('_attention')}")
    chosen = c.get("attn_implementation")
    if quiet(chosen) or str(chosen) == "auto":
        return
    known = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "flash": "flash_attention_2", "disabled": "eager"}
    known |= {"flex": "flex_attention", "sdp": "sdpa"}
    name = known.get(str(chosen), str(chosen))
    if name in ("xformers", "sage", "fp8", "varlen"):
        c.later("attn_implementation", f"the attention {name}")
    else:
        c.put("hf.attention", name, "attn_implementation")


def checkpointing(c: Conversion) -> None:
    """Recomputing in the backward, and keeping activations in host memory."""
    value, offload = c.get("gradient_checkpointing"), c.get("activation_offloading")
    if c.has("disable_gradient_checkpointing"):
        value = not flag(c.get("disable_gradient_checkpointing"))
    if str(value).lower() in ("offload", "offload_disk"):
        offload, value = ("disk" if str(value).lower() == "offload_disk" else True), True
        c.put("activations.offload", "cpu", "gradient_checkpointing", note="an older spelling of activation_offloading")
    elif offload is not None and not quiet(offload):
        c.put("activations.offload", "cpu", "activation_offloading")
    if offload in ("disk", "hidden_states"):
        c.differs("activation_offloading", f"{offload}: kept in host memory here")
    if value is None or not flag(value):
        if "activations" in c.plugins:
            c.put("activations.policy", "none", "gradient_checkpointing")
        return
    c.start("activations")
    c.put("activations.policy", "full", "gradient_checkpointing", "disable_gradient_checkpointing", always=True)
    key = "gradient_checkpointing_kwargs"
    options = c.get(key)
    for name, given in (mapping(options) if not quiet(options) else {}).items():
        place_ = {"use_reentrant": "reentrant", "preserve_rng_state": "preserve_rng"}.get(name)
        inner = f"{c.table.key(key)}.{name}"
        if place_:
            c.put(f"activations.{place_}", flag(given), inner)
        else:
            c.later(inner, "this option of recomputing")


def template(c: Conversion) -> None:
    """A chat template by name, as a file, or as text."""
    text = c.get("chat_template_jinja") or c.get("chat_template_path")
    source = "chat_template_jinja" if c.has("chat_template_jinja") else "chat_template_path"
    if not quiet(text):
        if "\n" not in str(text) and str(text).endswith((".jinja", ".jinja2", ".j2")):
            c.put("hf.chat_template", place(str(text), c.folder), source)
        elif source == "chat_template_path":
            c.later(source, "the template of another model: save it as a .jinja file, and name that")
        else:
            c.later(
                source, "a template inside the config: write it into a .jinja file, and name that in hf.chat_template"
            )
    name = c.get("chat_template")
    if quiet(name):
        return
    word = str(name)
    if word in ("jinja", "tokenizer_default", "default"):
        c.unneeded("chat_template", "the tokenizer's own, or the one in the other key")
    elif word.startswith("tokenizer_default_fallback_"):
        c.differs(
            "chat_template", "the tokenizer's own; a fallback is no choice here: set hf.chat_template if it has none"
        )
    elif word.endswith((".jinja", ".jinja2", ".j2")):
        c.put("hf.chat_template", place(word, c.folder), "chat_template")
    elif word in TEMPLATES:
        c.start("templates")
        note = "the template of this name that comes with Pegbox: its mask is exact, its text may differ in details"
        c.put("hf.chat_template", TEMPLATES[word], "chat_template", note=note, differs=True)
    else:
        c.later("chat_template", f"the template {word}: save it as a .jinja file, and name that in hf.chat_template")


def special_tokens(c: Conversion) -> None:
    """Tokens that take a part, and tokens to add."""
    given = c.get("special_tokens")
    for role, token in (mapping(given) if not quiet(given) else {}).items():
        key = f"special_tokens.{role}"
        if role in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if token is not None:
                c.put(f"hf.special_tokens.{role}", str(token), key)
        elif role == "additional_special_tokens":
            _add(c, names(token), True, key)
        else:
            c.later(key, "this part of a token")
    for name in ("eos_token", "pad_token"):
        if c.has(name) and not quiet(c.get(name)):
            c.put(f"hf.special_tokens.{name}", str(c.get(name)), name)
    for name, special in (("tokens", False), ("add_tokens", False), ("add_special_tokens", True)):
        if c.has(name) and not quiet(c.get(name)):
            _add(c, names(c.get(name)), special, name)


def _add(c: Conversion, tokens: list[str], special: bool, name: str) -> None:
    old = list(c.draft.get("hf", {}).get("new_tokens", []))
    c.put("hf.new_tokens", [*old, *({"text": token, "special": True} if special else token for token in tokens)], name)


def model_options(c: Conversion) -> None:
    """Options of from_pretrained that the run's result depends on."""
    given = c.get("model_init_kwargs")
    for name, value in (mapping(given) if not quiet(given) else {}).items():
        key = f"{c.table.key('model_init_kwargs')}.{name}"
        if name in ("dtype", "torch_dtype"):
            c.put("model.dtype" if "lora" in c.plugins else "hf.trainable_dtype", dtype(value), key)
        elif name == "attn_implementation":
            c.put("hf.attention", str(value), key)
        elif name == "revision":
            c.put("model.revision", str(value), key)
        elif name in ("use_cache", "low_cpu_mem_usage", "device_map"):
            c.unneeded(key, "training needs no cache, and the plugin places the model")
        elif name == "rope_scaling":
            c.put("hf.rope_scaling", value, key)
        else:
            c.later(key, "this option of from_pretrained")
    trusted = c.get("trust_remote_code")
    if trusted is not None and flag(trusted):
        named = next(key for key, rule in c.table.rules.items() if rule.to == "model.name")
        model = str(c.foreign.get(named, ""))
        c.put("hf.trust_remote_code", [model], "trust_remote_code", note="code is trusted by the model's name here")


def compiling(c: Conversion) -> None:
    """torch.compile."""
    value = c.get("torch_compile")
    if value is None or (str(value).lower() != "auto" and not flag(value)):
        return
    regional = c.get("torch_compile_regional")
    scope = "layers" if regional is not None and flag(regional) else "model"
    c.put(
        "compile.scope",
        scope,
        "torch_compile",
        *(("torch_compile_regional",) if c.has("torch_compile_regional") else ()),
    )
    for name in ("backend", "mode"):
        if not quiet(c.get(f"torch_compile_{name}")):
            c.put(f"compile.{name}", str(c.get(f"torch_compile_{name}")), f"torch_compile_{name}")
    if not quiet(c.get("torch_compile_options")):
        c.put("compile.options", mapping(c.get("torch_compile_options")), "torch_compile_options")


def placement(c: Conversion) -> None:
    """FSDP, by a section, a switch or a list; DeepSpeed is not here."""
    shards, config = c.get("fsdp"), c.get("fsdp_config")
    if c.has("deepspeed") and not quiet(c.get("deepspeed")):
        c.later("deepspeed", "DeepSpeed; its stage 3 shards as the plugin fsdp does")
    used = (not quiet(shards) or not quiet(config)) and not quiet(c.get("enable_fsdp", "plain") or True)
    if not used or ("enable_fsdp" in c.table.names and not flag(c.get("enable_fsdp") or False)):
        return
    c.start("fsdp")
    sources = [name for name in ("fsdp", "enable_fsdp") if c.has(name)] or ["fsdp_config"]
    c.put("use.place_model", "fsdp", *sources)
    for name, value in config.items() if isinstance(config, dict) else ():
        key = f"{c.table.key('fsdp_config')}.{name}"
        if key in c.entries and c.entries[key].status != "mapped":
            continue
        _fsdp_option(c, name.removeprefix("fsdp_"), value, key)


def _fsdp_option(c: Conversion, name: str, value: Any, key: str) -> None:
    options = c.table.facts.get("fsdp", FSDP)
    if name in options:
        c.put(f"fsdp.{options[name]}", flag(value), key)
    elif name in FSDP_OWN:
        c.unneeded(key, FSDP_OWN[name])
    elif quiet(value):
        c.unneeded(key, "switched off")
    else:
        c.later(key, "this option of FSDP")


FSDP = {"offload_params": "offload", "cpu_offload": "offload", "reshard_after_forward": "reshard_after_forward"}
"""Options of FSDP that the plugin fsdp has, by their names elsewhere."""
FSDP_OWN = {
    "version": "FSDP2 is the only one here",
    "fsdp_version": "FSDP2 is the only one here",
    "auto_wrap_policy": "layers are found by themselves",
    "transformer_layer_cls_to_wrap": "layers are found by themselves",
    "cpu_ram_efficient_loading": "each process loads what it keeps",
    "sync_module_states": "each process loads what it keeps",
    "use_orig_params": "FSDP2 always does",
    "state_dict_type": "checkpoints are sharded, exports are whole",
    "final_state_dict_type": "exports are whole",
    "backward_prefetch": "FSDP2 prefetches by itself",
    "forward_prefetch": "FSDP2 prefetches by itself",
    "limit_all_gathers": "FSDP2 needs none",
    "min_num_params": "layers are found by themselves",
    "enable_fsdp": "read above",
}
"""Options of FSDP that need nothing here, and why."""
