"""The conformance kit: rules that every plugin keeps, inherited as tests, and small real things to test plugins with.

    from pegbox.testing import LossConformance, PluginConformance

    class TestHinge(PluginConformance, LossConformance):
        plugin = "hinge"
        config = {"margin": 0.5}

A rule is a plain function in `pegbox.testing.rules` that raises `RuleBroken` with what was seen, why it is a rule,
and what to change; the classes in `pegbox.testing.conformance` turn rules into tests. The idea of standard tests that
are inherited and may not be silently overridden follows langchain's `langchain_tests`.

The kit needs pytest (`pip install 'pegbox-core[testing]'`) and runs without torch; what needs torch or transformers
imports them when it is used, and is skipped only where they are not installed. Nothing is imported here: pytest loads
this package wherever the core is installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pegbox.testing.batches import pad_batch, split_batch
    from pegbox.testing.conformance import (
        CheckpointConformance,
        CommandConformance,
        LossConformance,
        PatchConformance,
        PluginConformance,
        ScoreConformance,
        WrapperConformance,
    )
    from pegbox.testing.fingerprint import foreign_classes_stay_as_they_are
    from pegbox.testing.recorder import HookCall, HookRecorder
    from pegbox.testing.rule import RuleBroken
    from pegbox.testing.running import RunResult, run_cli, run_config
    from pegbox.testing.runtime import FakeRuntime
    from pegbox.testing.subject import Subject
    from pegbox.testing.tiny import (
        ByteTokenizer,
        TinyExamples,
        TinyPlacement,
        plain_model,
        tiny_batches,
        tiny_model,
        tiny_processor,
        tiny_rollouts,
    )

LIVES_IN = {
    "batches": "pad_batch split_batch",
    "conformance": (
        "CheckpointConformance CommandConformance LossConformance PatchConformance PluginConformance "
        "ScoreConformance WrapperConformance"
    ),
    "fingerprint": "foreign_classes_stay_as_they_are",
    "recorder": "HookCall HookRecorder",
    "rule": "RuleBroken",
    "running": "RunResult run_cli run_config",
    "runtime": "FakeRuntime",
    "subject": "Subject",
    "tiny": "ByteTokenizer TinyExamples TinyPlacement plain_model tiny_batches tiny_model tiny_processor tiny_rollouts",
}
MODULE_OF = {name: module for module, names in LIVES_IN.items() for name in names.split()}

__all__ = [
    "ByteTokenizer",
    "CheckpointConformance",
    "CommandConformance",
    "FakeRuntime",
    "HookCall",
    "HookRecorder",
    "LossConformance",
    "PatchConformance",
    "PluginConformance",
    "RuleBroken",
    "RunResult",
    "ScoreConformance",
    "Subject",
    "TinyExamples",
    "TinyPlacement",
    "WrapperConformance",
    "foreign_classes_stay_as_they_are",
    "pad_batch",
    "plain_model",
    "run_cli",
    "run_config",
    "split_batch",
    "tiny_batches",
    "tiny_model",
    "tiny_processor",
    "tiny_rollouts",
]


def __getattr__(name: str) -> object:
    if name in MODULE_OF:
        return getattr(import_module(f"pegbox.testing.{MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'pegbox.testing' has no attribute {name!r}")
