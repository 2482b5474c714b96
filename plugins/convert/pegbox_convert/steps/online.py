"""Online methods: how completions are sampled, what is learnt from them, who samples, and the rewards."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps.methods import ONLINE
from pegbox_convert.steps.preferences import reference
from pegbox_convert.steps.rewards import rewards
from pegbox_convert.values import flag, mapping, quiet

SAMPLING = (
    ("samples", "num_generations", "whole"),
    ("max_completion_length", "max_completion_length", "whole"),
    ("temperature", "temperature", "decimal"),
    ("top_p", "top_p", "decimal"),
    ("top_k", "top_k", "whole"),
    ("min_p", "min_p", "decimal"),
    ("repetition_penalty", "repetition_penalty", "decimal"),
    ("iterations", "num_iterations", "whole"),
    ("eval_samples", "num_generations_eval", "whole"),
)
LEARNING = (
    ("mask_truncated", "mask_truncated_completions", "flag"),
    ("entropy_coef", "entropy_coef", "decimal"),
    ("top_entropy_quantile", "top_entropy_quantile", "decimal"),
    ("off_policy_mask_threshold", "off_policy_mask_threshold", "decimal"),
)
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "rloo")
"""Objectives that clip on both sides."""
OBJECTIVES = (*CLIPPED, "cispo", "sapo", "vespo")
PROCESSES = "prompts of a step of one process: with more of them multiply it by their number"
STARTED = "the run starts the server itself: name vLLM's interpreter in rollout-vllm.python"


def online(c: Conversion) -> None:
    """The section grpo, an engine, and rewards."""
    if c.method not in ONLINE:
        return
    for ours, theirs, read in SAMPLING:
        if c.get(theirs) is not None:
            c.put(f"grpo.{ours}", c.get(theirs, read), theirs)
    _stops(c)
    kind = _objective(c)
    _clipping(c, kind)
    for ours, theirs, read in LEARNING:
        if c.get(theirs) is not None:
            c.put(f"grpo.{ours}", c.get(theirs, read), theirs)
    _divergence(c)
    _engine(c)
    rewards(c)


def batch(c: Conversion, micro: int, accumulation: int) -> None:
    """`trainer.batch` counts prompts of a generation, `trainer.micro_batch` completions."""
    samples, per_step = c.get("num_generations", "positive_whole"), micro * accumulation
    whole, parts = c.get("generation_batch_size", "whole"), c.get("steps_per_generation", "whole")
    updates = whole // per_step if whole else parts // accumulation if parts else 1
    updates = max(updates, 1)
    completions = max(whole or 0, per_step) if whole else per_step * updates
    note = "prompts of a generation" if whole else PROCESSES
    if completions % samples:
        note += f"; {completions} completions of one process are no whole groups of {samples}"
    sized = ("generation_batch_size",) if whole else ("steps_per_generation",) if parts else ()
    rest = ("gradient_accumulation_steps", *sized)
    c.put("trainer.batch", max(completions // samples, 1), *rest, note=note, differs=not whole, always=True)
    c.put("grpo.steps_per_generation", updates, *sized)
    c.put("trainer.micro_batch", micro, "per_device_train_batch_size", note="completions")


def _stops(c: Conversion) -> None:
    given = c.get("generation_kwargs")
    for name, value in (mapping(given) if not quiet(given) else {}).items():
        key = f"{c.table.key('generation_kwargs')}.{name}"
        listed: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        if name == "stop_token_ids":
            c.put("grpo.stop_ids", [int(one) for one in listed], key)
        elif name in ("stop", "stop_strings"):
            c.put("grpo.stop", [str(one) for one in listed], key)
        elif name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            c.put(f"grpo.{name}", value, key)
        else:
            c.later("generation_kwargs", f"{name}: of generation grpo sets what its page lists", key=key)


def _objective(c: Conversion) -> str:
    if c.method == "rloo":
        c.put("grpo.loss_type", "rloo")
        c.put("grpo.advantage", "rloo")
        scaled = c.get("normalize_advantages")
        c.put("grpo.scale_rewards", "batch" if scaled is not None and flag(scaled) else "none", "normalize_advantages")
        return "rloo"
    name = "objective" if c.has("objective") else "loss_type"
    kind = str(c.get(name) or c.get("objective") or "dapo")
    if kind not in OBJECTIVES:
        c.later(name, f"the objective {kind}; those of grpo.loss_type: {', '.join(OBJECTIVES)}")
        kind = "dapo"
    else:
        c.put("grpo.loss_type", kind, name)
    level = str(c.get("importance_sampling_level") or "token")
    if kind in ("vespo", "rloo") and level == "sequence":
        c.unneeded("importance_sampling_level", f"{kind} has its own ratio of completions")
    else:
        c.put("grpo.importance_sampling_level", level, "importance_sampling_level")
    _scaling(c)
    return kind


def _scaling(c: Conversion) -> None:
    given = c.get("scale_rewards")
    words = {"true": "group", "false": "none", "yes": "group", "no": "none"}
    word = words.get(str(given).lower(), str(given))
    gdpo = str(c.get("rl") or "").lower() == "gdpo"
    together = "normalize_then_sum" if gdpo else str(c.get("multi_objective_aggregation") or "sum_then_normalize")
    names = ("multi_objective_aggregation", *(("rl",) if gdpo else ()))
    c.put("grpo.multi_objective_aggregation", together, *names)
    if together == "normalize_then_sum" and word != "group":
        c.later("scale_rewards", "normalize_then_sum scales within groups: leave it out")
    elif word in ("group", "batch", "none"):
        c.put("grpo.scale_rewards", word, "scale_rewards")
    else:
        c.later("scale_rewards", f"{word} is neither group, batch nor none")


def _clipping(c: Conversion, kind: str) -> None:
    acts = {"epsilon": kind in CLIPPED, "delta": kind in CLIPPED, "epsilon_high": kind not in ("sapo", "vespo")}
    acts |= {f"sapo_temperature_{sign}": kind == "sapo" for sign in ("pos", "neg")}
    acts |= {f"vespo_{letter}_{sign}": kind == "vespo" for letter in ("k", "lambda") for sign in ("pos", "neg")}
    for name, on in acts.items():
        if c.get(name) is None:
            continue
        if on:
            c.put(f"grpo.{name}", c.get(name, "decimal"), name)
        elif c.has(name):
            c.unneeded(name, f"the objective {kind} does not use it")


def _divergence(c: Conversion) -> None:
    name = "trl_beta" if c.has("trl_beta") else "beta"
    beta = c.get(name, "decimal") or 0.0
    c.put("grpo.beta", beta, name)
    if beta:
        reference(c)
        if c.method == "rloo":
            c.put("grpo.kl_placement", "reward")
            c.put("grpo.kl_estimator", "k1")
        elif c.get("use_bias_correction_kl") is not None:
            c.put("grpo.use_bias_correction_kl", flag(c.get("use_bias_correction_kl")), "use_bias_correction_kl")


def _engine(c: Conversion) -> None:
    """Who samples: the policy in this process, or vLLM."""
    given = c.get("use_vllm")
    if given is None or not flag(given):
        c.start("rollout-hf")
        if c.has("use_vllm"):
            c.note_plugin("use_vllm", "rollout-hf")
        c.put("grpo.importance_sampling_correction", "none")
        together = next((n for n in ("use_transformers_continuous_batching", "use_transformers_paged") if c.has(n)), "")
        if together and flag(c.get(together)):
            c.put("rollout-hf.continuous", "on", together)
        return
    c.start("rollout-vllm")
    c.note_plugin("use_vllm", "rollout-vllm", "its own log-probabilities are checked at every update of the weights")
    _correction(c)
    mode = str(c.get("vllm_mode") or "server")
    if c.has("vllm_mode") and mode == "server":
        c.put("rollout-vllm.mode", mode, "vllm_mode")
    if mode == "colocate":
        note = f"vLLM as a server beside the trainer, not within its process; {STARTED}"
        c.put("rollout-vllm.mode", "server", "vllm_mode", note=note, differs=True)
        if not c.has("vllm_mode"):
            c.differs("use_vllm", note)
    started = mode == "colocate" or bool(c.foreign.leaves("vllm"))
    if started:
        _started(c)
    else:
        _address(c)
    if c.get("vllm_enable_sleep_mode") is not None:
        c.put("rollout-vllm.sleep", flag(c.get("vllm_enable_sleep_mode")), "vllm_enable_sleep_mode")


def _started(c: Conversion) -> None:
    """A server that the run starts."""
    options = (
        ("memory_share", "vllm_gpu_memory_utilization", "decimal"),
        ("max_model_len", "vllm_max_model_length", "whole"),
        ("tensor_parallel", "vllm_tensor_parallel_size", "whole"),
        ("dtype", "vllm_dtype", "text"),
        ("eager", "vllm_enforce_eager", "flag"),
    )
    for ours, theirs, read in options:
        if c.get(theirs) is not None:
            c.put(f"rollout-vllm.{ours}", c.get(theirs, read), theirs)
    if str(c.get("vllm_model_impl") or "vllm") != "vllm":
        c.put("rollout-vllm.args", ["--model-impl", str(c.get("vllm_model_impl"))], "vllm_model_impl")
    if c.get("vllm_server_timeout") is not None:
        c.put("rollout-vllm.start_timeout_s", c.get("vllm_server_timeout", "decimal"), "vllm_server_timeout")
    for name in ("vllm_server_host", "vllm_server_port", "vllm_host", "vllm_port"):
        if c.has(name):
            c.unneeded(name, f"a free port of this machine; {STARTED}")


def _address(c: Conversion) -> None:
    """A server that exists."""
    url = c.get("vllm_server_base_url")
    host = str(c.get("vllm_server_host")).replace("0.0.0.0", "127.0.0.1")
    address = str(url) if not quiet(url) else f"http://{host}:{c.get('vllm_server_port')}"
    names = ["vllm_server_base_url"] if not quiet(url) else ["vllm_server_host", "vllm_server_port"]
    note = "a server of vLLM itself (vllm serve), with the switches that the page of rollout-vllm lists"
    c.put("rollout-vllm.url", address, *names, note=note, differs=True)
    if not any(c.has(name) for name in names):
        c.differs("use_vllm", note)
    if c.has("vllm_server_timeout"):
        c.put("rollout-vllm.start_timeout_s", c.get("vllm_server_timeout", "decimal"), "vllm_server_timeout")


def _correction(c: Conversion) -> None:
    """What becomes of the ratio between trainer and sampler."""
    on = c.get("vllm_importance_sampling_correction")
    if on is None or not flag(on) or c.method == "rloo":
        c.put("grpo.importance_sampling_correction", "none", "vllm_importance_sampling_correction")
        return
    mode = str(c.get("vllm_importance_sampling_mode"))
    both = ("vllm_importance_sampling_mode", "vllm_importance_sampling_correction")
    c.put("grpo.importance_sampling_correction", mode, *both)
    for side in ("max", "min"):
        name = f"vllm_importance_sampling_clip_{side}"
        if c.get(name) is not None:
            c.put(f"grpo.importance_sampling_clip_{side}", c.get(name, "decimal"), name)
