"""Which backend is chosen where, and what is refused with which words, before anything expensive."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from document_batches import Run
from pegbox.errors import ConfigError, PatchError, PluginError
from pegbox.events import RunBegins
from pegbox_attention import installed as packages
from pegbox_attention.checking import Heads
from pegbox_attention.sinks.choice import Place, choose
from pegbox_attention.sinks.config import GptOssAttentionConfig

Load = Callable[..., Run]
HOPPER, AMPERE, AMD = Place("sm_90", "bf16"), Place("sm_80", "bf16"), Place("amd", "bf16")
FULL, WINDOW = Heads(64, 8, 64, None), Heads(64, 8, 64, 128)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`installed("pegbox_kernels.attention")`: these modules can be imported, and no other ones that backends need."""

    def only(*modules: str) -> None:
        monkeypatch.setattr(packages, "version", lambda package: "9" if package.module in modules else None)

    return only


EVERYTHING = ("pegbox_kernels.attention", "flash_attn.cute")
OURS = ("pegbox_kernels.attention",)


@pytest.mark.parametrize(
    ("place", "modules", "full", "window"),
    [
        (HOPPER, EVERYTHING, "flash-attn-4", "pegbox"),
        (HOPPER, OURS, "pegbox", "pegbox"),
        (HOPPER, ("flash_attn.cute",), "flash-attn-4", "flash-attn-4"),
        (HOPPER, (), "flex", "flex"),
        (Place("sm_90", "fp32"), EVERYTHING, "pegbox", "pegbox"),
        (Place("sm_100", "fp16"), EVERYTHING, "flash-attn-4", "pegbox"),
        (AMPERE, EVERYTHING, "pegbox", "pegbox"),
        (AMD, EVERYTHING, "pegbox", "pegbox"),
        (Place("sm_120", "bf16"), EVERYTHING, "pegbox", "pegbox"),
        (Place("sm_75", "fp16"), EVERYTHING, "eager", "eager"),
        (Place("cpu", "fp32"), EVERYTHING, "pegbox", "pegbox"),
        (Place("cpu", "fp64"), EVERYTHING, "eager", "eager"),
        (Place("mps", "fp32"), EVERYTHING, "eager", "eager"),
    ],
)
def test_auto_takes_the_first_that_can(
    place: Place, modules: tuple[str, ...], full: str, window: str, installed: Callable[..., None]
) -> None:
    installed(*modules)
    config = GptOssAttentionConfig()
    assert choose("full", config, FULL, place) == full
    assert choose("window", config, WINDOW, place) == window


@pytest.mark.parametrize(
    ("place", "modules", "heads", "section", "says"),
    [
        (HOPPER, OURS, FULL, {"backend": "flash-attn-4"}, r"flash_attn.cute is not installed; type: pip install"),
        (AMPERE, EVERYTHING, FULL, {"backend": "flash-attn-4"}, "does not train with sinks on sm_80"),
        (Place("sm_90", "fp32"), EVERYTHING, FULL, {"backend": "flash-attn-4"}, "bf16 and fp16, not in fp32"),
        (HOPPER, EVERYTHING, Heads(8, 8, 256, None), {"backend": "flash-attn-4"}, "heads of 8 to 128"),
        (Place("cpu", "fp32"), EVERYTHING, FULL, {"backend": "flex"}, "does not train with sinks on cpu"),
        (HOPPER, (), FULL, {"backend": "pegbox"}, "pegbox_kernels.attention is not installed"),
        (HOPPER, EVERYTHING, Heads(8, 8, 512, None), {"backend": "pegbox"}, "heads of 1 to 256"),
        (AMPERE, EVERYTHING, FULL, {"backend": "flash-attn-4"}, "Set gpt-oss-attention.backend to pegbox or flex or"),
    ],
)
def test_a_backend_that_is_asked_for_and_cannot_serve_is_an_error(
    place: Place,
    modules: tuple[str, ...],
    heads: Heads,
    section: dict[str, Any],
    says: str,
    installed: Callable[..., None],
) -> None:
    installed(*modules)
    with pytest.raises(ConfigError, match=says):
        choose("full", GptOssAttentionConfig(**section), heads, place)


def test_a_version_without_gradients_of_sinks_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, taken in (("4.0.0b25", "pegbox"), ("4.0.0b26", "flash-attn-4"), ("4.0.0", "flash-attn-4")):
        monkeypatch.setattr(packages, "version", lambda package, version=version: version)
        assert choose("full", GptOssAttentionConfig(), FULL, HOPPER) == taken
    monkeypatch.setattr(packages, "version", lambda package: "4.0.0b25")
    with pytest.raises(ConfigError, match=r"flash-attn-4 is 4\.0\.0b25, older than 4\.0\.0b26; type: pip install"):
        choose("full", GptOssAttentionConfig(backend="flash-attn-4"), FULL, HOPPER)


def test_the_window_backend_is_the_other_one_unless_it_is_set(installed: Callable[..., None]) -> None:
    installed(*EVERYTHING)
    assert choose("window", GptOssAttentionConfig(backend="flash-attn-4"), WINDOW, HOPPER) == "flash-attn-4"
    mixed = GptOssAttentionConfig(backend="flash-attn-4", window_backend="auto")
    assert choose("window", mixed, WINDOW, HOPPER) == "pegbox"
    with pytest.raises(ConfigError, match=r"gpt-oss-attention\.window_backend is flash-attn-4"):
        choose("window", GptOssAttentionConfig(window_backend="flash-attn-4"), WINDOW, AMPERE)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="it is installed")
def test_what_is_not_installed_is_an_error_before_anything_is_read(load: Load) -> None:
    run = load({"backend": "flash-attn-4"}, meta=True)
    with pytest.raises(ConfigError, match=r"flash_attn\.cute is not installed"):
        run.ctx.notify(RunBegins())


def test_what_cannot_serve_is_an_error_before_weights_are_read(load: Load) -> None:
    with pytest.raises(ConfigError, match="does not train with sinks on cpu") as raised:
        load({"backend": "flex"})
    (note,) = raised.value.__notes__
    assert "'gpt-oss-attention'" in note
    assert "hook configure_model" in note


def test_a_model_without_sinks_is_refused(tmp_path: Any) -> None:
    from pegbox import hooks
    from pegbox.patches import PatchLog
    from pegbox.plan import compose
    from pegbox.testing.tiny import tiny_model

    ctx = compose({"model": {"name": "tiny"}, "plugins": ["gpt-oss-attention"], "output": str(tmp_path)})
    with pytest.raises(PatchError, match=r"needs a model with attention_sinks, but tiny has causal"):
        PatchLog().apply(tiny_model(), ctx.each(hooks.patch_attention, ctx, tiny_model()))


@pytest.mark.parametrize("implementation", ["eager", "pegbox"])
def test_two_plugins_on_attention_are_an_error_that_names_both(implementation: str, load: Load) -> None:
    with pytest.raises(PluginError, match=r"(?s)(attention.*gpt-oss-attention|gpt-oss-attention.*'attention')"):
        load({}, "attention", attention={"implementation": implementation})


def test_attention_asked_of_hf_as_well_is_an_error_that_names_both(load: Load) -> None:
    with pytest.raises(PluginError, match=r"(?s)flash_attention_4.*gpt-oss-attention"):
        load({}, hf={"attention": "flash_attention_4"})


def test_dropped_attention_weights_are_refused(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"drops 0\.1 of its attention weights"):
        load({}, hf={"config_overrides": {"attention_dropout": 0.1}})
