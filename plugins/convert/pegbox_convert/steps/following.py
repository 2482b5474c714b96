"""Trackers, the hub, samples, the loss: what follows a run."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.values import flag, names, quiet

TRACKERS = {"comet_ml": "comet", "tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
TRACKERS |= {"swanlab": "swanlab", "trackio": "trackio", "comet": "comet"}
NAMED = ("wandb", "mlflow", "comet", "swanlab", "trackio")


def report_to(c: Conversion) -> None:
    """The trackers of transformers' `report_to`, with the name of the run."""
    value = c.get("report_to")
    wanted = [] if quiet(value) else names(value)
    if "all" in wanted:
        c.later("report_to", "all trackers that are installed: name them")
        return
    for name in wanted:
        if name.lower() in TRACKERS:
            tracker = TRACKERS[name.lower()]
            c.put(f"trackers.{tracker}", dict(c.draft.get("trackers", {}).get(tracker, {})), "report_to")
        elif name.lower() != "none":
            c.later("report_to", f"the tracker {name}")
    _run_name(c)
    for name, path in (("project", "trackers.trackio.project"), ("trackio_space_id", "trackers.trackio.space_id")):
        if "trackio" in c.draft.get("trackers", {}) and not quiet(c.get(name)):
            c.put(path, str(c.get(name)), name)


def _run_name(c: Conversion) -> None:
    chosen = [name for name in c.draft.get("trackers", {}) if name in NAMED]
    if not c.has("run_name") or quiet(c.get("run_name")):
        return
    for tracker in chosen:
        c.put(f"trackers.{tracker}.name", str(c.get("run_name")), "run_name")
    if not chosen:
        c.unneeded("run_name", "no tracker shows it; the run's folder is its name")


def switched_trackers(c: Conversion) -> None:
    """Trackers with a switch each: `use_wandb` (also by its project), `enable_wandb` and so on."""
    for tracker in (*NAMED, "tensorboard"):
        switch = next((s for s in (f"use_{tracker}", f"enable_{tracker}") if c.get(s) is not None), f"use_{tracker}")
        value, project = c.get(switch), c.get(f"{tracker}_project")
        if (value is None or not flag(value)) and not (value is None and project and tracker == "wandb"):
            continue
        c.put(f"trackers.{tracker}", {}, switch, f"{tracker}_project")
        for key, place in (c.table.facts.get("trackers", {}).get(tracker, {})).items():
            _tracker_option(c, key, f"trackers.{tracker}.{place}")
    if "run_name" in c.table.known() or "training.run_name" in c.table.known():
        _run_name(c)


def _tracker_option(c: Conversion, key: str, path: str) -> None:
    value: Any = c.get(key)
    if quiet(value) and not isinstance(value, bool):
        return
    c.put(path, value if isinstance(value, bool) else str(value), key)


def hub(c: Conversion) -> None:
    """Where the finished run is pushed to."""
    wanted, repo = c.get("push_to_hub"), c.get("hub_model_id")
    if (wanted is None and quiet(repo)) or (wanted is not None and not flag(wanted)):
        return
    if quiet(repo):
        c.later("push_to_hub", "a repository by the name of the output folder: set hub.repo to owner/name")
        return
    c.put("hub.repo", str(repo), "hub_model_id", "push_to_hub")
    private = c.get("hub_private_repo")
    c.put("hub.private", bool(private and flag(private)), "hub_private_repo")
    if not quiet(c.get("hub_revision")):
        c.put("hub.revision", str(c.get("hub_revision")), "hub_revision")
    if c.has("hub_strategy"):
        c.put("hub.repo", str(repo), "hub_strategy", note="the finished run is pushed, no checkpoints", differs=True)


def samples(c: Conversion) -> None:
    """Answers of the model at each evaluation."""
    older = c.get("eval_table_size", "positive_whole")
    if quiet(c.get("generate_samples")) and not older:
        return
    if older:
        c.put("samples.rows", older, "eval_table_size", note="an older spelling of generate_samples")
    else:
        c.put("samples.rows", c.get("num_generation_samples", "whole"), "num_generation_samples", "generate_samples")
    c.put("samples.max_new_tokens", c.get("generation_max_new_tokens", "whole"), "generation_max_new_tokens")
    sampled = c.get("generation_do_sample")
    temperature = c.get("generation_temperature", "decimal") if sampled is None or flag(sampled) else 0.0
    c.put("samples.temperature", temperature, "generation_temperature", "generation_do_sample")
    if temperature and c.get("generation_top_p") is not None:
        c.put("samples.top_p", c.get("generation_top_p", "decimal"), "generation_top_p")
    for name in ("generation_top_k", "generation_prompt_ratio"):
        if c.has(name):
            c.later(name, "this option of sample generations; a prompt ends where the first trained token begins")


def relora(c: Conversion) -> None:
    """ReLoRA's restarts."""
    if quiet(c.get("relora")):
        return
    for place, name in (("every", "jagged_restart_steps"), ("warmup_steps", "jagged_restart_warmup_steps")):
        if c.get(name) is not None:
            c.put(f"relora.{place}", c.get(name, "whole"), name, "relora")
    c.put("relora.anneal_steps", c.get("jagged_restart_anneal_steps", "whole") or 0, "jagged_restart_anneal_steps")
    c.put("relora.prune", str(c.get("relora_prune_method") or "magnitude"), "relora_prune_method")
    if c.get("relora_prune_ratio") is not None:
        c.put("relora.prune_ratio", c.get("relora_prune_ratio", "decimal"), "relora_prune_ratio")


def loss(c: Conversion) -> None:
    """Cross entropy, or that weighted by probability; in chunks where the program asks for it."""
    if c.method != "sft":
        return
    kind = str(c.get("loss_type") or "nll")
    weighted = c.get("use_dft")
    if kind == "dft" or (weighted is not None and flag(weighted)):
        c.start("dft")
        for name in ("loss_type", "use_dft"):
            if c.has(name):
                c.note_plugin(name, "dft")
    else:
        c.start("sft")
        if kind not in ("nll", "chunked_nll"):
            c.later("loss_type", f"the loss {kind}")
        elif c.has("loss_type"):
            c.note_plugin("loss_type", "sft")
    chunked = c.get("chunked_cross_entropy")
    if (chunked is not None and flag(chunked)) or kind == "chunked_nll":
        name = "loss_type" if kind == "chunked_nll" else "chunked_cross_entropy"
        c.start("chunked-cross-entropy")
        c.note_plugin(name, "chunked-cross-entropy", "the same loss: the size of a chunk is ours")


def router(c: Conversion) -> None:
    """The load-balancing loss of mixtures of experts, by its coefficient."""
    value = c.get("router_aux_loss_coef")
    if value is None:
        return
    coefficient = c.get("router_aux_loss_coef", "decimal")
    if coefficient:
        c.put("router-loss.coefficient", coefficient, "router_aux_loss_coef")
    else:
        c.unneeded("router_aux_loss_coef", "without the plugin router-loss there is none")
