"""The library's kernels are put where they compute the same, into instances, and nowhere without a GPU."""

from __future__ import annotations

import json
import logging
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from pegbox import hooks
from pegbox.errors import ConfigError, PatchError, RunError
from pegbox.events import RunBegins
from pegbox.patches import PatchLog
from pegbox.testing import FakeRuntime

ALL = {"rope": "auto"}
FOUND = {
    "llama": {"norm": 5, "mlp": 2, "rope": 2},
    "qwen3": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma2": {"norm": 9, "mlp": 2, "rope": 2},
    "gemma3_text": {"norm": 13, "mlp": 2, "rope": 2},
    "phi3": {"norm": 5, "mlp": 2, "rope": 2},
    "olmo2": {"norm": 9, "mlp": 2, "rope": 2},
    "gpt_oss": {"norm": 5, "rope": 2},
    "gpt_neox": {"norm": 5, "rope": 2},
}
"""Modules of each slot that are replaced in a model of two layers."""
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def applied(ctx, model) -> PatchLog:
    log = PatchLog()
    log.apply(model, ctx.each(hooks.patch_modules, ctx, model, "base"))
    return log


@pytest.mark.parametrize("family", FOUND)
def test_what_fits_is_found_in_each_family(family: str, network, context) -> None:
    log = applied(context(**ALL), network(family))
    assert dict(Counter(one.patch.slot for one in log.applied)) == FOUND[family]


def test_epsilon_and_offset_of_every_norm_are_those_that_the_library_chooses(network, context, answer) -> None:
    """Its own tables for these families say what fits; ours come from the numbers of the modules."""
    families = ["llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_oss"]
    library = json.loads(answer("library_choices.py", *families).splitlines()[-1])
    for family in families:
        model = network(family)
        applied(context(), model)
        ours = {
            name: [module.variance_epsilon, module.offset]
            for name, module in model.module.named_modules()
            if hasattr(module, "casting_mode")
        }
        assert ours == {name: chosen[:2] for name, chosen in library[family].items()}


def test_rounding_of_norms_follows_the_module(network, context) -> None:
    for family, cast in {"llama": "llama", "gemma2": "gemma", "gpt_oss": "gemma"}.items():
        model = network(family)
        applied(context(), model)
        norms = [module for module in model.module.modules() if hasattr(module, "casting_mode")]
        assert {module.casting_mode for module in norms} == {cast}
        assert not any(module.in_place for module in norms)


def test_rope_in_the_interpreter_leaves_loss_and_gradients_as_they_are(answer) -> None:
    assert answer("interpreted_rope.py", "llama", "gpt_oss", interpret=True).splitlines()[-2:] == [
        "llama 2",
        "gpt_oss 2",
    ]


def test_weights_are_found_under_the_names_they_had(network, context) -> None:
    for family in ("qwen3", "gpt_neox"):
        model = network(family)
        before = {name: id(parameter) for name, parameter in model.module.named_parameters()}
        log = applied(context(**ALL), model)
        assert {name: id(parameter) for name, parameter in model.module.named_parameters()} == before
        log.undo()


def test_no_class_or_function_of_transformers_is_changed(network, context) -> None:
    from transformers.models.llama import modeling_llama as theirs

    names = ("LlamaRMSNorm", "LlamaMLP", "LlamaForCausalLM", "apply_rotary_pos_emb")
    before = [getattr(theirs, name) for name in names], theirs.LlamaRMSNorm.forward, theirs.LlamaMLP.forward
    applied(context(**ALL), network("llama"))
    assert ([getattr(theirs, name) for name in names], theirs.LlamaRMSNorm.forward, theirs.LlamaMLP.forward) == before


@ON_CPU
def test_without_a_gpu_the_run_ends_before_anything_is_read(context) -> None:
    ctx = context()
    with pytest.raises(ConfigError, match="liger is in plugins, but this run is on a CPU") as error:
        ctx.notify(RunBegins())
    assert "Remove liger from plugins" in error.value.next


def test_a_run_on_the_cpu_is_refused_where_there_is_a_gpu_too(network, context) -> None:
    ctx = context()
    ctx.runtime = FakeRuntime()
    with pytest.raises(ConfigError, match="this run is on a CPU"):
        ctx.each(hooks.patch_modules, ctx, network("llama"), "base")


def test_a_kernel_that_gives_other_numbers_stops_the_run(network, context, monkeypatch: pytest.MonkeyPatch) -> None:
    from pegbox_kernels.recognition import norms

    ctx = context()
    ctx.runtime = SimpleNamespace(device=torch.device("cuda", 0), precision="bf16")
    right = norms.agrees
    monkeypatch.setattr(norms, "agrees", lambda *args, **more: len(args) < 3 and right(*args, **more))
    with pytest.raises(RunError, match=r"liger-kernel gives other numbers for .*norm .* on cuda:0"):
        ctx.each(hooks.patch_modules, ctx, network("llama"), "base")


@pytest.mark.parametrize(
    ("family", "section", "message"),
    [
        ("llama", {"geglu": True}, "liger.geglu is true, but nothing of it is found in llama"),
        ("llama", {"layer_norm": True}, "liger.layer_norm is true"),
        ("cohere", {"swiglu": False}, "liger finds nothing to do in cohere"),
        ("cohere", {"rms_norm": True}, "Left alone: 3 CohereLayerNorm, which computes something else"),
        ("cohere", {"rope": True, "swiglu": False}, "liger.rope is true"),
    ],
)
def test_what_must_fit_and_does_not_is_an_error(family: str, section: dict, message: str, network, context) -> None:
    with pytest.raises(ConfigError, match=message):
        applied(context(**section), network(family))


def test_what_is_left_alone_is_named(network, context, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pegbox"):
        applied(context(**ALL), network("cohere"))
    assert "liger.rms_norm leaves alone: 3 CohereLayerNorm, which computes something else" in caplog.text
    assert "liger.rope leaves alone: 2 CohereAttention" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "pegbox"):
        applied(context(**ALL), network("llama"))
    assert not caplog.text


def test_nothing_at_all_is_an_error(context) -> None:
    with pytest.raises(ConfigError, match="all off; nothing would be done"):
        context(rms_norm=False, layer_norm=False, swiglu=False, geglu=False)


@pytest.mark.parametrize(
    ("on", "slot"), [({"rms_norm": "auto"}, "norm"), ({"swiglu": "auto"}, "mlp"), ({"rope": "auto"}, "rope")]
)
def test_beside_the_plugin_fused_on_one_slot_is_an_error_that_names_both(on: dict, slot: str, network, context) -> None:
    pytest.importorskip("pegbox_fused")
    off = {"rms_norm": False, "layer_norm": False, "swiglu": False, "geglu": False}
    ctx = context(("fused",), **{**off, **on})
    if slot == "rope":
        ctx.config.sections["fused"] = ctx.config.sections["fused"].model_copy(update={"rope": True})
    with pytest.raises(PatchError) as error:
        applied(ctx, network("llama"))
    assert f"two patches for the {slot} of" in error.value.what
    assert "plugin 'fused'" in error.value.what
    assert "plugin 'liger'" in error.value.what
    assert "switch the feature off in one of them" in error.value.next


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the library's kernels run on a GPU")
@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_loss_and_gradients_are_those_without_it(family: str, dtype: torch.dtype, network, context) -> None:
    def outcome(module: torch.nn.Module):
        ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).cuda()
        module.zero_grad()
        loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    model, ctx = network(family), context(**ALL)
    ctx.runtime = SimpleNamespace(
        device=torch.device("cuda", 0), precision="bf16" if dtype == torch.bfloat16 else "fp32"
    )
    model.module.to("cuda", dtype)
    expected = outcome(model.module)
    log = applied(ctx, model)
    found = outcome(model.module)
    log.verify()
    slack = {"rtol": 1e-2, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(found, expected, **slack)
