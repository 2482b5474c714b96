"""Losses of preferences, and reward models: their settings by the name of the trainer's arguments."""

from __future__ import annotations

from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.steps.methods import RATES
from pegbox_convert.values import flag, names, quiet

DPO = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
"""Losses of the plugin dpo."""
SMOOTHED = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}
OF_DIFFERENCES = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}
EXO_SMOOTHING = 1e-3
"""What TRL takes for exo_pair without a smoothing."""


def preferences(c: Conversion) -> None:
    """The section of the method that the config is for."""
    written = {"dpo": _dpo, "kto": _kto, "orpo": _orpo, "simpo": _simpo, "cpo": _cpo, "reward": _reward, "prm": _prm}
    if c.method in written:
        written[c.method](c)
    if c.method in ("dpo", "kto"):
        reference(c)


def _beta(c: Conversion, path: str, *others: str) -> None:
    """The beta of a method, by the first key that is set."""
    name = next((one for one in ("trl_beta", "beta", *others) if c.has(one)), "beta")
    c.put(path, c.get(name, "decimal"), name)


def _losses(c: Conversion) -> tuple[dict[str, float], list[str]]:
    """The losses of DPO with their weights, and the keys that name them."""
    if str(c.get("rl") or "").lower() == "ipo":
        return {"ipo": 1.0}, ["rl"]
    name = "pref_loss" if c.table.name == "llamafactory" else "loss_type"
    given = c.get(name)
    kinds = names(given) if not quiet(given) else ["sigmoid"]
    known = [kind for kind in kinds if kind in DPO]
    for kind in [kind for kind in kinds if kind not in DPO]:
        c.later(name, f"the loss {kind}; those of dpo.loss: {', '.join(DPO)}")
    weights = c.get("loss_weights")
    listed = weights if isinstance(weights, list) else [] if weights is None else [weights]
    if listed and len(listed) != len(kinds):
        c.later("loss_weights", f"{len(listed)} weights for {len(kinds)} losses: write dpo.loss as losses with weights")
        listed = []
    by_name = dict(zip(kinds, map(float, listed), strict=True)) if listed else dict.fromkeys(kinds, 1.0)
    keys = [name, *(["loss_weights"] if listed else [])]
    return {kind: by_name[kind] for kind in known} or {"sigmoid": 1.0}, keys


def _dpo(c: Conversion) -> None:
    losses, keys = _losses(c)
    note = ""
    if quiet(c.get("pref_bco_weight")) is False:
        weight = c.get("pref_bco_weight", "decimal")
        losses = {kind: share / (1 + weight) for kind, share in losses.items()} | {"bco_pair": weight / (1 + weight)}
        keys, note = [*keys, "pref_bco_weight"], "bco_pair without the running mean of rewards"
    for name in ("pref_ftx", "rpo_alpha"):
        if not quiet(c.get(name)):
            losses["sft"] = c.get(name, "decimal")
            keys, note = [*keys, name], "; ".join(part for part in (note, RATES) if part)
    single = next(iter(losses)) if list(losses.values()) == [1.0] else None
    c.put("dpo.loss", single or losses, *keys, note=note, differs=bool(note))
    kinds = set(losses)
    if kinds != {"sft"}:
        _beta(c, "dpo.beta")
        _optional(c, "dpo.ld_alpha", "ld_alpha")
    _smoothing(c, kinds)
    if kinds & OF_DIFFERENCES:
        c.put("dpo.f_divergence", str(c.get("f_divergence_type") or "reverse_kl"), "f_divergence_type")
        if c.get("f_divergence_type") == "alpha_divergence":
            c.put("dpo.f_alpha", c.get("f_alpha_divergence_coef", "decimal"), "f_alpha_divergence_coef")
    if "discopop" in kinds:
        c.put("dpo.discopop_tau", c.get("discopop_tau", "decimal"), "discopop_tau")
    weighed = c.get("use_weighting")
    if weighed is not None:
        c.put("dpo.use_weighting", flag(weighed), "use_weighting")


def _smoothing(c: Conversion, kinds: set[str]) -> None:
    value = c.get("label_smoothing", "decimal") or 0.0
    if "exo_pair" in kinds and not value:
        c.put("dpo.label_smoothing", EXO_SMOOTHING, "label_smoothing", note="what exo_pair takes in place of 0")
    elif kinds & SMOOTHED:
        idle = bool(value) and "sigmoid" in kinds and c.table.name != "llamafactory"
        note = "sigmoid is smoothed here (conservative DPO), by TRL 1.16 no more" if idle else ""
        c.put("dpo.label_smoothing", value, "label_smoothing", note=note, differs=idle)
    elif value and c.has("label_smoothing"):
        c.unneeded("label_smoothing", f"the loss {', '.join(sorted(kinds))} has none")


def _optional(c: Conversion, path: str, name: str) -> None:
    if c.get(name) is not None:
        c.put(path, c.get(name, "decimal"), name)


def reference(c: Conversion) -> None:
    """Which model the policy is compared with, and how."""
    c.start("reference")
    before = c.get("precompute_ref_log_probs")
    if before is not None and flag(before):
        if c.method == "kto" and c.get("loss_type") != "apo_zero_unpaired":
            c.later(
                "precompute_ref_log_probs", "of the KL term of kto the reference computes in each step: leave it out"
            )
        else:
            c.put("reference.how", "precomputed", "precompute_ref_log_probs")
    if not quiet(c.get("ref_model")):
        c.put("reference.how", "copy", "ref_model")
        c.put("reference.model", str(c.get("ref_model")), "ref_model")
    synced = c.get("sync_ref_model")
    if synced is None or not flag(synced):
        return
    if "lora" in c.plugins:
        c.later("sync_ref_model", "a reference that follows an adapter: train all weights, or leave it out")
        return
    c.put("reference.how", "copy", "sync_ref_model")
    c.put("reference.sync_every", c.get("ref_model_sync_steps", "whole"), "sync_ref_model", "ref_model_sync_steps")
    c.put("reference.mixup", c.get("ref_model_mixup_alpha", "decimal"), "ref_model_mixup_alpha")


def _kto(c: Conversion) -> None:
    kind = str(c.get("loss_type") or "kto") if c.table.name in ("trl", "oumi") else "kto"
    if kind in ("kto", "apo_zero_unpaired"):
        c.put("kto.loss", kind, "loss_type")
    else:
        c.later("loss_type", f"the loss {kind}; those of kto.loss: kto, apo_zero_unpaired")
    _beta(c, "kto.beta")
    for name in ("desirable_weight", "undesirable_weight"):
        # Axolotl takes 1 in place of 0, as of nothing.
        value = c.get(name, "decimal")
        c.put(f"kto.{name}", (value or 1.0) if c.table.name == "axolotl" else value, name)
    if not quiet(c.get("pref_ftx")):
        c.start("sft")
        c.put("loss", {"kto": 1.0, "sft": c.get("pref_ftx", "decimal")}, "pref_ftx", note=RATES, differs=True)


def _orpo(c: Conversion) -> None:
    _beta(c, "orpo.alpha", "orpo_alpha")


def _simpo(c: Conversion) -> None:
    """SimPO by Axolotl (TRL's CPO trainer) or LLaMA-Factory, whose share of likelihood is another key."""
    _beta(c, "simpo.beta")
    c.put("simpo.gamma", c.get("simpo_gamma", "decimal"), "simpo_gamma")
    if c.table.name == "llamafactory":
        if not quiet(c.get("pref_ftx")):
            c.put("simpo.sft_weight", c.get("pref_ftx", "decimal"), "pref_ftx", note=RATES, differs=True)
        return
    c.put("simpo.sft_weight", c.get("cpo_alpha", "decimal"), "cpo_alpha")


def _cpo(c: Conversion) -> None:
    kind = str(c.get("loss_type") or "sigmoid")
    if kind in ("simpo", "alphapo"):
        c.plugins.discard("cpo")
        c.note_plugin("loss_type", "simpo", "AlphaPO is simpo with an alpha" if kind == "alphapo" else "")
        c.start("simpo")
        _simpo(c)
        if kind == "alphapo" or c.has("alpha"):
            c.put("simpo.alpha", c.get("alpha", "decimal"), "alpha")
        _of_simpo(c)
        return
    if kind in ("sigmoid", "hinge", "ipo"):
        c.put("cpo.loss", kind, "loss_type")
    else:
        c.later("loss_type", f"the loss {kind}; those of cpo.loss: sigmoid, hinge, ipo")
    _beta(c, "cpo.beta")
    c.put("cpo.sft_weight", c.get("cpo_alpha", "decimal"), "cpo_alpha")
    c.put("cpo.alpha", c.get("alpha", "decimal"), "alpha")
    if kind == "sigmoid":
        c.put("cpo.label_smoothing", c.get("label_smoothing", "decimal"), "label_smoothing")


def _of_simpo(c: Conversion) -> None:
    if c.has("label_smoothing"):
        c.put("simpo.label_smoothing", c.get("label_smoothing", "decimal"), "label_smoothing")


def _reward(c: Conversion) -> None:
    c.put("reward.center", c.get("center_rewards_coefficient", "decimal") or 0.0, "center_rewards_coefficient")
    _labels(c, 1)


def _prm(c: Conversion) -> None:
    _labels(c, 2)


def _labels(c: Conversion, expected: int) -> None:
    """How many numbers the head predicts: the method says it."""
    given: Any = c.get("num_labels")
    if c.has("num_labels") and given == expected:
        c.unneeded("num_labels", f"the plugin {c.method} asks for {expected}")
    elif c.has("num_labels"):
        c.later("num_labels", f"{given} labels: the plugin {c.method} has {expected}")
