"""Which method a config is for, and what that makes the default of a key.

A program names it in a key (`rl`, `stage`, `trainer_type`), or in the command (`trl dpo`). A TRL config without its
command is told by the keys that only one trainer has.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from pegbox_convert.conversion import Conversion
from pegbox_convert.values import flag, names, quiet

PLUGINS = {
    "dpo": ("reference", "dpo"),
    "kto": ("reference", "kto"),
    "orpo": ("orpo",),
    "simpo": ("simpo",),
    "cpo": ("cpo",),
    "reward": ("reward",),
    "prm": ("prm",),
    "grpo": ("grpo",),
    "rloo": ("grpo",),
}
"""Plugins of each method."""
FORMATS = {"kto": "unpaired", "prm": "steps", "grpo": "prompts", "rloo": "prompts"}
"""Formats of rows by method; other methods take preferences."""
ONLINE = ("grpo", "rloo")
STEADY = ("dpo", "kto", "orpo", "simpo", "cpo", "reward")
"""Methods whose trainers switch dropout off; LLaMA-Factory's of reward models does not."""
OTHER = "other"
"""A method that is not here: the config gets no loss, so that it cannot run as another one."""
AXOLOTL = {"dpo": "dpo", "ipo": "dpo", "kto": "kto", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo", "gdpo": "grpo"}
OUMI = {"hf": "sft", "oumi": "sft", "trl_sft": "sft", "hf_trainer": "sft"}
OUMI |= {"trl_dpo": "dpo", "trl_kto": "kto", "trl_grpo": "grpo"}
FACTORY = {"sft": "sft", "pt": "sft", "dpo": "dpo", "kto": "kto", "rm": "reward"}
NOTES = {
    "kto": "the KL term is estimated over the whole step, there in each micro-batch",
    "orpo": "the likelihood is that of answers alone, there that of prompts too",
}
RATES = "there each answer's likelihood counts alike, here each token's"
TELLING = (
    ("rloo", ("normalize_advantages", "reward_clip_range")),
    ("grpo", ("reward_funcs", "reward_weights", "num_generations", "max_completion_length", "use_vllm")),
    ("kto", ("desirable_weight", "undesirable_weight")),
    ("cpo", ("cpo_alpha", "simpo_gamma")),
    ("reward", ("center_rewards_coefficient",)),
    (
        "dpo",
        (
            *("beta", "loss_weights", "ld_alpha", "f_divergence_type", "use_weighting", "discopop_tau"),
            *("precompute_ref_log_probs", "label_smoothing"),
        ),
    ),
)
"""Keys of TRL that tell the trainer, those that fewer trainers have first."""
BY_LOSS = {"nll": "sft", "chunked_nll": "sft", "dft": "sft", "kto": "kto", "apo_zero_unpaired": "kto"}
BY_LOSS |= {"simpo": "cpo", "alphapo": "cpo"}
BY_LOSS |= dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"), "grpo")


@cache
def defaults() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Defaults of keys by method, by the functions' names."""
    return tomllib.loads(files("pegbox_convert").joinpath("tables", "methods.toml").read_text(encoding="utf-8"))


def method(c: Conversion) -> None:
    """Find the method, make its plugins active, and take its defaults."""
    c.method = {"axolotl": _axolotl, "trl": _trl, "llamafactory": _factory, "oumi": _oumi}[c.table.name](c)
    for plugin in PLUGINS.get(c.method, ()):
        c.start(plugin)
    known = defaults().get({"simpo": "cpo"}.get(c.method, c.method), {})
    listed = {**known.get("defaults", {}), **known.get(c.table.name, {})}
    found = {c.table.key(name): value for name, value in listed.items()}
    if found:
        c.table = replace(c.table, defaults={**c.table.defaults, **found})
    leaves = c.method == "reward" and c.table.name == "llamafactory"
    if c.method in STEADY and not leaves and _dropout_is_off(c):
        c.fix("lora.dropout", 0.0, "the trainer there switches all dropout off")


def _dropout_is_off(c: Conversion) -> bool:
    given = c.get("disable_dropout")
    if c.has("disable_dropout"):
        note = "of the adapter (lora.dropout); the model's own is what its config says"
        c.differs("disable_dropout", note) if flag(given) else c.unneeded("disable_dropout", "dropout stays on")
    return given is None or flag(given)


def _known(c: Conversion, name: str, word: str, found: str | None, missing: str) -> str:
    if found is None:
        c.later(name, f"{missing}: the new config has no loss, so that it cannot run as another method")
        return OTHER
    plugins = PLUGINS.get(found, ("sft",))
    if c.has(name):
        c.note_plugin(name, plugins[-1], "")
        if found in NOTES:
            c.differs(name, RATES if (found, c.table.name) == ("orpo", "llamafactory") else NOTES[found])
        if word == "ipo":
            c.mapped(c.table.key(name), "dpo.loss")
    return found


def _axolotl(c: Conversion) -> str:
    if not quiet(c.get("rl")):
        word = str(c.get("rl")).lower()
        missing = {"ebft": "EBFT", "ppo": "online methods with a critic (PPO)"}.get(word, f"the method {word}")
        return _known(c, "rl", word, AXOLOTL.get(word), missing)
    for name, found in (("reward_model", "reward"), ("process_reward_model", "prm")):
        if not quiet(c.get(name)) and flag(c.get(name)):
            return _known(c, name, "", found, "")
    others = ("kd_trainer", "diffusion_lm", "diffusion")
    return OTHER if any(not quiet(c.get(name)) for name in others) else "sft"


def _trl(c: Conversion) -> str:
    command = c.foreign.command
    if command:
        return command if command in PLUGINS or command == "sft" else OTHER
    losses = c.get("loss_type")
    kinds = names(losses) if c.has("loss_type") and not quiet(losses) else []
    by_loss = {BY_LOSS.get(kind, "dpo") for kind in kinds if kind not in ("hinge", "ipo", "sigmoid")}
    telling = next((found for found, keys in TELLING if any(c.has(key) for key in keys)), None)
    found = by_loss.pop() if len(by_loss) == 1 else telling or ("dpo" if kinds else "sft")
    if found != "sft":
        tells = ["loss_type"] if c.has("loss_type") else []
        tells += [key for _, keys in TELLING for key in keys if c.has(key)]
        c.differs(tells[0], f"by this key the config is read as one of `trl {found}`; --from trl:NAME says another")
    return found


def _factory(c: Conversion) -> str:
    stage = str(c.get("stage"))
    found = FACTORY.get(stage)
    if found == "dpo":
        found = {"orpo": "orpo", "simpo": "simpo"}.get(str(c.get("pref_loss") or "sigmoid"), "dpo")
    if found in ("orpo", "simpo"):
        c.note_plugin("pref_loss", found)
    known = _known(c, "stage", stage, found, {"ppo": "online methods with a critic (PPO)"}.get(stage, f"stage {stage}"))
    if found == "orpo" and not quiet(c.get("pref_ftx")):
        c.later("pref_ftx", "orpo has the likelihood of answers already: leave it out")
    return known


def _oumi(c: Conversion) -> str:
    word = str(c.get("trainer_type") or "hf").lower().rpartition(".")[2]
    missing = {
        "verl_grpo": "GRPO by verl: TRL_GRPO is read",
        "trl_gkd": "distillation",
        "trl_gold": "distillation",
    }.get(word, f"the trainer {word}")
    return _known(c, "trainer_type", word, OUMI.get(word), missing)
