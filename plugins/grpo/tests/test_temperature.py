"""Log-probabilities that are learnt from are those at the temperature of the sampler."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_rl
import torch
from pegbox.errors import ConfigError
from pegbox.types import Model
from pegbox_grpo.temperature import Tempering, patches
from tiny_rl import Plugin, config_of, records, run


def model_of(**changes: Any) -> Model:
    module = tiny_rl.build_model()
    model = Model(module=module, name="tiny", base="tiny", format="transformers", compute=tiny_rl.compute)
    return replace(model, **changes)


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_trainer_and_sampler_agree_at_any_temperature(tmp_path: Path, temperature: float) -> None:
    tiny = Plugin()
    grpo = {"temperature": temperature, "iterations": 2}
    run(config_of(tmp_path / "run", grpo=grpo, trainer={"max_steps": 3}), tiny)
    assert {request.sampling.temperature for request in tiny.requests} == {temperature}
    first = records(tmp_path / "run")[0]
    assert first["sampling/sampling_logp_difference/mean"] < 1e-5


def test_a_tempered_head_gives_the_softmax_of_divided_logits() -> None:
    model, tempering = model_of(), Tempering(0.7)
    (patch,) = patches(model, tempering)
    head, projection = model.module.token_head, model.module.lm_head
    hidden, targets, needs = torch.randn(5, 32), torch.arange(5), frozenset({"logps", "entropy"})
    plain = head(hidden, projection, targets, needs)
    head.forward = patch.replace(head)
    assert torch.equal(head(hidden, projection, targets, needs).logps_N, plain.logps_N), (
        "outside learning nothing changes"
    )
    tempering.observe("learn")
    logps = (projection(hidden) / 0.7).log_softmax(-1)
    outputs = head(hidden, projection, targets, needs)
    torch.testing.assert_close(outputs.logps_N, logps[torch.arange(5), targets])
    torch.testing.assert_close(outputs.entropy_N, -(logps.exp() * logps).sum(-1))
    tempering.observe("generate")
    assert torch.equal(head(hidden, projection, targets, needs).logps_N, plain.logps_N)


def test_only_a_policy_and_its_reference_are_tempered() -> None:
    assert not patches(model_of(), Tempering(1.0))
    assert not patches(model_of(role="reward"), Tempering(0.5))
    assert patches(model_of(role="reference"), Tempering(0.5))


@pytest.mark.parametrize("what", ["a bias", "a soft cap"])
def test_a_head_that_is_more_than_a_projection_is_refused(what: str) -> None:
    model = model_of()
    if what == "a bias":
        model.module.lm_head.bias = torch.nn.Parameter(torch.zeros(tiny_rl.VOCABULARY))
    else:
        model.module.token_head.rule = type("Rule", (), {"softcap": 30.0})()
    with pytest.raises(ConfigError, match=what):
        patches(model, Tempering(0.5))
