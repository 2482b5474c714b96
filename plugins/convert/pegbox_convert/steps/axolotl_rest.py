"""Axolotl's learning rates by group, frozen parameters, and integrations."""

from __future__ import annotations

import re

from pegbox_convert.conversion import Conversion
from pegbox_convert.values import number, quiet, text

INTEGRATIONS = {
    "LigerPlugin": "kernels (fused layers and losses)",
    "CutCrossEntropyPlugin": "kernels (losses; the plugin chunked-cross-entropy saves the same memory)",
    "KernelsPlugin": "kernels for experts",
    "KDPlugin": "distillation",
    "SpectrumPlugin": "Spectrum",
    "GrokfastPlugin": "Grokfast",
    "LMEvalPlugin": "benchmarks after training",
    "NemoGymPlugin": "online methods",
    "LLMCompressorPlugin": "quantizing after training",
    "DiffusionPlugin": "diffusion language models",
    "ContextParallelPlugin": "context parallelism",
    "ExpertParallelPlugin": "expert parallelism",
}
"""Axolotl's own plugins by class name, and what they bring."""


def integrations(c: Conversion) -> None:
    """Axolotl's plugins: modules that patch the trainer; ours are other things."""
    listed = c.get("plugins")
    if quiet(listed):
        return
    for path in listed if isinstance(listed, list) else [listed]:
        name = str(path).rpartition(".")[2]
        if name == "SwanLabPlugin":
            c.note_plugin("plugins", "trackers", "SwanLab")
        else:
            c.later("plugins", INTEGRATIONS.get(name, f"Axolotl's plugin {name}"))


def groups(c: Conversion) -> None:
    """Learning rates of parameters by name, and of embeddings."""
    listed = c.get("lr_groups")
    found = []
    for index, group in enumerate(listed if isinstance(listed, list) else ()):
        modules = [str(name) for name in group.get("modules") or ()]
        pattern = "|".join(rf"(^|\.){re.escape(name)}(\.|$)" for name in modules)
        found.append({"pattern": pattern, "learning_rate": float(number(group.get("lr")))})
        for key in group:
            place = {"modules": "pattern", "lr": "learning_rate"}.get(key)
            full = f"lr_groups.{index}.{key}"
            c.mapped(full, f"optim.groups: {place}") if place else c.unneeded(full, "a name for the reader")
    if found:
        c.put("optim.groups", found)
    if c.get("embedding_lr") is not None:
        c.put("optim.embedding_learning_rate", c.get("embedding_lr", "decimal"), "embedding_lr")
    elif c.get("embedding_lr_scale") is not None:
        c.put("optim.embedding_scale", c.get("embedding_lr_scale", "decimal"), "embedding_lr_scale")


def unfrozen(c: Conversion) -> None:
    """Parameters that are trained, by expressions; Axolotl's ranges of rows are not."""
    listed = c.get("unfrozen_parameters")
    if quiet(listed):
        return
    expressions = [text(one) for one in (listed if isinstance(listed, list) else [listed])]
    whole = [one for one in expressions if not re.search(r"\[\d*:?\d*\]$", one)]
    if len(whole) < len(expressions):
        c.later("unfrozen_parameters", "ranges of rows (freeze.rows trains the rows of tokens)")
    if whole and "lora" not in c.plugins:
        anchored = [one if one.startswith("^") else f"^{one}" for one in whole]
        c.put("freeze.train", anchored, "unfrozen_parameters", note="matched from the name's start, as there")
    elif whole:
        c.later("unfrozen_parameters", "whole parameters beside an adapter (lora.modules_to_save trains whole modules)")
