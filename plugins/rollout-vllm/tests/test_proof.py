"""Probes, the canary, and checksums: what can be said about them without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pegbox.errors import RunError
from pegbox.testing import FakeRuntime
from pegbox.testing.tiny import VOCABULARY, tiny_model, tiny_processor
from pegbox_rollout_vllm.canary import VISIBLE, disturbed
from pegbox_rollout_vllm.cargo import Folder
from pegbox_rollout_vllm.checksums import digest, parts_of, readable, require_equal
from pegbox_rollout_vllm.probes import DRAWN, EXACT, HALF, LENGTH, SENTENCES, difference, draw, tolerance, trainer_logps
from safetensors.torch import save_file

TOLERANCE = 0.01
LAST = VOCABULARY - 1


@pytest.fixture
def ctx(compose_config: Any) -> Any:
    torch.set_num_threads(1)
    made = compose_config({"model": {"name": "tiny"}, "plugins": ["rollout-vllm"]})
    made.runtime, made.processor = FakeRuntime(), tiny_processor()
    return made


def test_probes_are_those_of_the_seed_and_hold_no_special_token(ctx: Any) -> None:
    model = tiny_model()
    probes = draw(ctx, model)
    assert probes == draw(ctx, model)
    special = set(ctx.processor.tokenizer.all_special_ids)
    assert all(0 <= token < VOCABULARY and token not in special for row in probes for token in row)
    assert len({len(row) for row in probes}) == 1
    assert sum(row[0] == LAST for row in probes) == DRAWN
    assert bytes(probes[0]) == SENTENCES[0][:LENGTH].encode()


def test_probes_hold_no_token_that_the_model_does_not_know(ctx: Any) -> None:
    narrow = tiny_model(vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    assert max(token for row in draw(ctx, narrow) for token in row) == 199


def test_the_trainers_log_probabilities_are_those_of_a_plain_forward_and_leave_the_mode(ctx: Any) -> None:
    model, probes = tiny_model(placed=True), draw(ctx, tiny_model())
    frozen = model.module.model.norm.eval()
    found = trainer_logps(ctx, model, probes)
    assert model.module.training
    assert not frozen.training
    ids = torch.tensor(probes)
    with torch.no_grad():
        logps = model.module.eval()(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = logps.gather(-1, ids[:, 1:, None]).flatten()
    assert torch.allclose(torch.tensor(found), expected, atol=1e-5)


def test_the_canary_is_seen_and_put_back_bit_for_bit_also_after_an_error(ctx: Any) -> None:
    model, probes = tiny_model(placed=True), draw(ctx, tiny_model())
    model.module.model.embed_tokens.weight.requires_grad_(False)
    with torch.no_grad():
        model.module.lm_head.weight.zero_()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    plain, state = trainer_logps(ctx, model, probes), torch.get_rng_state()
    changed: set[str] = set()

    def look_and_fail() -> None:
        with disturbed(ctx, model, probes, TOLERANCE) as (expected, allowed):
            now = model.module.state_dict()
            changed.update(name for name, tensor in now.items() if not torch.equal(before[name], tensor))
            assert difference(plain, expected) >= VISIBLE * TOLERANCE
            assert TOLERANCE < allowed < difference(plain, expected) / 4
            assert expected == trainer_logps(ctx, model, probes)
            raise KeyError("something else failed")

    with pytest.raises(KeyError, match="something else failed"):
        look_and_fail()
    assert changed == {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_canary_that_nobody_could_see_is_an_error(ctx: Any) -> None:
    model = tiny_model(placed=True)
    model.module.requires_grad_(False)
    with (
        pytest.raises(RunError, match=r"moved the probes' log-probabilities by 0 nats only"),
        disturbed(ctx, model, draw(ctx, model), TOLERANCE),
    ):
        pass


def test_the_tolerance_follows_the_arithmetic_of_both_sides(ctx: Any) -> None:
    assert tolerance(ctx, None, "auto") == tolerance(ctx, None, "float32") == EXACT
    assert tolerance(ctx, None, "bfloat16") == HALF
    assert tolerance(ctx, 0.5, "bfloat16") == 0.5
    ctx.runtime.precision = "bf16"
    assert tolerance(ctx, None, "auto") == tolerance(ctx, None, "float32") == HALF


def test_parts_of_joined_parameters_are_named() -> None:
    layer = "dp0:pp0:pcp0:tp0:model.layers.0.self_attn.{}.base_layer.weight"
    assert parts_of(layer.format("qkv_proj")) == tuple(
        f"model.layers.0.self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj")
    )
    assert parts_of(layer.format("o_proj")) == ("model.layers.0.self_attn.o_proj.weight",)


def write(folder: Path, seed: int, **changes: torch.Tensor) -> Folder:
    folder.mkdir(exist_ok=True)
    source = torch.Generator().manual_seed(seed)
    shapes = {"a.q_proj.weight": (4, 3), "a.k_proj.weight": (2, 3), "a.v_proj.weight": (2, 3), "norm.weight": (3,)}
    weights = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    save_file({**weights, **changes}, folder / "model.safetensors")
    return Folder(folder)


def held(cargo: Folder, dtype: torch.dtype) -> dict[str, str]:
    """What a worker says that joined the projections, packed one parameter and holds all in `dtype`."""
    with cargo.tensors() as weights:
        joined, norm = torch.cat([weights[f"a.{name}_proj.weight"] for name in "qkv"]), weights["norm.weight"]
    packed = digest(torch.zeros(0), dtype)
    return {
        "tp0:a.qkv_proj.weight": digest(joined, dtype),
        "tp0:norm.weight": digest(norm, dtype),
        "tp0:packed.weight": packed,
    }


def test_checksums_find_what_is_readable_and_then_every_other_byte(tmp_path: Path) -> None:
    first, second = write(tmp_path / "first", 0), write(tmp_path / "second", 1)
    for dtype in (torch.float32, torch.bfloat16):
        known = readable(held(first, dtype), first)
        assert set(known) == {"tp0:a.qkv_proj.weight", "tp0:norm.weight"}
        assert {it.dtype for it in known.values()} == {dtype}
        require_equal(held(second, dtype), second, known, "v1")
        with pytest.raises(RunError, match=r"does not hold the weights of v1: 2 of 2 checksums"):
            require_equal(held(first, dtype), second, known, "v1")
    tiny = torch.randn(3, generator=torch.Generator().manual_seed(9))
    third = write(tmp_path / "third", 1, **{"norm.weight": tiny})
    fourth = write(tmp_path / "fourth", 1, **{"norm.weight": torch.nextafter(tiny, tiny + 1)})
    with pytest.raises(RunError, match=r"1 of 2 checksums that its workers give are others, first tp0:norm.weight"):
        require_equal(held(third, torch.float32), fourth, readable(held(first, torch.float32), first), "v2")


def test_names_of_versions_follow_the_weights(tmp_path: Path) -> None:
    one, same, other = (write(tmp_path / str(number), seed) for number, seed in enumerate((0, 0, 1)))
    assert one.seal("v3") == same.seal("v3")
    assert one.seal("v3") != other.seal("v3")
    assert one.seal("v3").endswith("-v3")
    assert one.path == tmp_path / "0"
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="holds no safetensors file"):
        Folder(tmp_path / "empty").seal("v3")


def test_a_temporary_folder_gets_its_name_when_it_is_whole_and_is_removed_in_the_end(tmp_path: Path) -> None:
    first, again = (write(tmp_path / name, 0) for name in ("part-1", "part-2"))
    one, two = Folder(first.path, temporary=True), Folder(again.path, temporary=True)
    assert one.path.with_name(one.seal("v0")) == one.path
    two.seal("v0")
    assert one == two
    assert [folder.name for folder in tmp_path.iterdir()] == [one.path.name]
    one.discard()
    assert not list(tmp_path.iterdir())
