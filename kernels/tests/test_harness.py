"""The harness tells a wrong operation from a right one, and prints no speed of a wrong one."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import pytest
import torch
from pegbox_kernels.harness import bench
from pegbox_kernels.harness.opspec import Cost
from pegbox_kernels.harness.parity import compare, error
from pegbox_kernels.harness.registry import specs

SPEC = specs()["logprob"]
SAMPLE = next(sample for sample in SPEC.samples if sample.name == "vocabulary of 63")


def slightly_wrong_value(**inputs):
    logps, entropy, logsumexp = SPEC.reference(**inputs)
    return logps, entropy * (1 + 1e-4), logsumexp


def wrong_gradient_alone(**inputs):
    logps, entropy, logsumexp = SPEC.reference(**inputs)
    return logps, entropy.detach() + 0 * inputs["logits"].float().sum(-1), logsumexp


def unwritten_element(**inputs):
    logps, entropy, logsumexp = SPEC.reference(**inputs)
    return logps.masked_fill(torch.arange(logps.numel()).view_as(logps) == 2, math.nan), entropy, logsumexp


@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (slightly_wrong_value, {"entropy", "dlogits"}),
        (wrong_gradient_alone, {"dlogits"}),
        (unwritten_element, {"logps"}),
    ],
)
def test_parity_names_what_is_wrong(op, wrong: set[str]) -> None:
    agreements = compare(replace(SPEC, op=op), SAMPLE, torch.float32, torch.device("cpu"))
    assert wrong <= {agreement.tensor for agreement in agreements if not agreement.holds} <= wrong | {"dlogits"}


def test_plain_pytorch_in_place_of_the_operation_agrees() -> None:
    spec = replace(SPEC, op=SPEC.reference)
    assert all(agreement.holds for agreement in compare(spec, SAMPLE, torch.bfloat16, torch.device("cpu")))


def test_an_error_is_infinite_where_only_one_side_is_finite() -> None:
    finite, broken = torch.zeros(3), torch.tensor([0.0, math.nan, 0.0])
    assert error(broken, finite) == error(finite, broken) == math.inf
    assert error(broken, broken) == 0.0
    assert error(torch.tensor([math.inf]), torch.tensor([-math.inf])) == math.inf
    assert error(torch.zeros(2), torch.zeros(3)) == math.inf


def test_the_gate_of_the_benchmark_fails_for_a_wrong_operation(capsys: pytest.CaptureFixture[str]) -> None:
    spec = replace(SPEC, op=slightly_wrong_value, samples=(SAMPLE,))
    assert not bench.agrees(spec, [torch.float32], torch.device("cpu"))
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_without_a_gpu_the_benchmark_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["logprob"]) == 2
    assert "No CUDA device" in capsys.readouterr().err


def test_every_line_of_the_csv_says_on_what_it_was_measured(tmp_path) -> None:
    machine = bench.Machine(gpu="G", driver="1", torch="2", triton="3", commit="c", date="2026-01-01")
    fast = bench.Measurement(op="o", workload="w", what="forward", contender="a", median_ms=1.23456789)
    lost = bench.Measurement(op="o", workload="w", what="forward", contender="b", status="out of memory")
    limits = bench.Limits(copy_gb_per_s=3000.0, product_tflop_per_s=700.0)
    path = bench.write(tmp_path / "new" / "o.csv", [fast, lost], machine, limits)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["ok", "out of memory"]
    assert lines[0]["median_ms"] == "1.2346"
    assert lines[1]["median_ms"] == ""
    assert all((line["gpu"], line["commit"], line["copy_gb_per_s"]) == ("G", "c", "3000") for line in lines)


def test_the_limit_is_the_longer_of_moving_the_bytes_and_computing_the_operations() -> None:
    limits = bench.Limits(copy_gb_per_s=1000.0, product_tflop_per_s=500.0)
    assert limits.least_ms(Cost(bytes_moved=2 * 10**9, flops=10**12)) == 2.0
    assert limits.least_ms(Cost(bytes_moved=10**9, flops=10**12)) == 2.0
    assert limits.least_ms(Cost(bytes_moved=10**9, flops=0)) == 1.0


def test_the_bytes_of_a_workload_are_one_read_forward_and_one_read_and_one_write_backward() -> None:
    workload = next(w for w in SPEC.workloads if w.name == "8192x128256 bfloat16")
    logits = 8192 * 128256 * 2
    assert logits < workload.forward.bytes_moved < logits * 1.001
    assert 2 * logits < workload.backward.bytes_moved < 2 * logits * 1.001
